"""The authors' release: their files, their names of weights, and which model a file is."""

from sret.checkpoints.official.keys import from_official as from_official
from sret.checkpoints.official.keys import official_keys as official_keys
from sret.checkpoints.official.keys import to_official as to_official
from sret.checkpoints.official.variants import identify as identify
from sret.checkpoints.official.variants import load_official as load_official
from sret.checkpoints.official.variants import read_official as read_official
