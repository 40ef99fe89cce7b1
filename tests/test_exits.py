"""Early exit: the model is unchanged, exits are parts of it, and images in batches leave as they would alone."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import small_config
from safetensors import safe_open
from safetensors.torch import load_file
from test_train import RECIPE
from torch.utils.flop_counter import FlopCounterMode

from sret import InputError, ModelConfig, SReT, StageConfig, fuse, model_cost
from sret.checkpoints.adapt import transfer
from sret.checkpoints.card import METADATA_KEY, Card, load_weights, save_weights
from sret.checkpoints.official import to_official
from sret.data.preprocess import Preprocessing
from sret.elastic import EarlyExit, ExitPolicy, Server, predict_with_exits
from sret.layers import Recursion
from sret.training.config import RuntimeConfig
from sret.training.distributed import make_accelerator
from sret.training.loop import train
from sret.training.run_dir import LAST
from sret.training.setup import EveryExit

KINDS = ("passes", "stages")


def exit_config(exits: str = "passes", **changes: object) -> ModelConfig:
    stages = (
        StageConfig(embed_dim=16, num_heads=2, num_blocks=1, groups=(4, 2), mlp_ratio=2.0),
        StageConfig(embed_dim=32, num_heads=4, num_blocks=2, groups=(2, 2, 1), mlp_ratio=2.0),
    )
    return ModelConfig(
        **{"stages": stages, "img_size": 32, "stem_stride": 4, "num_classes": 5, "exits": exits, **changes}
    )


def lively(model: SReT) -> SReT:
    """Weights with which logits differ between images and exits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.7 if name.startswith(("exits", "head")) else 0.05
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model.double().eval()


IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.double)


@pytest.mark.parametrize("exits", KINDS)
@pytest.mark.parametrize("is_training", [False, True])
def test_the_last_exit_is_the_model_and_exits_change_nothing(exits, is_training):
    torch.manual_seed(0)
    plain = SReT(exit_config("none"))
    torch.manual_seed(0)
    model = SReT(exit_config(exits, drop_rate=0.2 * (exits == "none")))
    for net in (plain, model):
        net.train(is_training)
    images = IMAGES.float()
    torch.manual_seed(3)
    expected = plain(images)
    torch.manual_seed(3)
    assert torch.equal(model(images), expected)
    torch.manual_seed(3)
    found = model.forward_exits(images)
    assert len(found) == {"passes": 6, "stages": 2}[exits]
    assert torch.equal(found[-1], expected)
    assert len({tuple(logits[0].tolist()) for logits in found}) == len(found)


def test_an_exit_after_a_pass_is_the_norm_and_its_classifier_on_the_shorter_model():
    model = lively(SReT(exit_config()))
    stage = model.stages[-1]
    found = model.forward_exits(IMAGES)
    stage.recursions = stage.recursions[:1]
    for passes in (1, 2, 3):
        stage.recursions[0].max_passes = passes
        features = model.norm(model.forward_features(IMAGES).mean((2, 3)))
        torch.testing.assert_close(found[passes - 1], model.exits[passes - 1](features))


def test_an_exit_after_a_stage_has_its_own_norm():
    model = lively(SReT(exit_config("stages")))
    features = model.stages[0](model.pos_embed(model.stem(IMAGES))).mean((2, 3))
    torch.testing.assert_close(model.forward_exits(IMAGES)[0], model.exits[0](model.exit_norms[0](features)))


def test_a_model_with_fewer_passes_has_the_exits_that_run():
    model = lively(SReT(exit_config()))
    for module in model.stages[-1].modules():
        if isinstance(module, Recursion):
            module.max_passes = 2
    found = model.forward_exits(IMAGES)
    assert len(found) == 4 == len(model_cost(model.config.first_passes(2)).exit_macs)
    assert torch.equal(found[-1], model(IMAGES))
    one = replace(exit_config().stages[1], num_blocks=1)
    model = lively(SReT(exit_config(stages=(exit_config().stages[0], one))))
    expected = model(IMAGES, passes=1)
    model.set_passes(1)
    net = EarlyExit(model, ExitPolicy(threshold=0.5))
    assert torch.equal(net(IMAGES), expected)
    assert net.share_of_macs() == 1
    model.set_passes(None)
    net(IMAGES)
    assert len(net.counts) == 3
    assert net.counts.sum() == len(IMAGES)


def test_a_server_follows_the_passes_of_its_model():
    model = lively(SReT(exit_config()))
    server = Server(model, ExitPolicy(threshold=1), batch_size=4)
    model.set_passes(1)
    results = list(server.predict([IMAGES]))
    assert {result.exit for result in results} == {1}
    torch.testing.assert_close(torch.stack([result.logits for result in results]), model(IMAGES))
    server.submit(IMAGES)
    model.set_passes(2)
    for call in (lambda: server.submit(IMAGES), server.step, lambda: list(server.predict([]))):
        with pytest.raises(InputError, match="while 12 images wait"):
            call()
    model.set_passes(1)
    model.train()
    with pytest.raises(InputError, match="call model"):
        server.step()
    model.eval()
    assert sorted(result.number for result in server.predict([])) == list(range(12, 24))


def test_a_copy_of_a_server_has_its_own_model():
    server = Server(lively(SReT(exit_config())), ExitPolicy(threshold=1), batch_size=4)
    server.submit(IMAGES[:5])
    for again in (copy.deepcopy(server), pickle.loads(pickle.dumps(server))):
        with torch.no_grad():
            again.model.head.weight.zero_()
        found = list(again.predict([]))
        assert [result.number for result in found] == list(range(5))
        assert all(torch.equal(result.logits, server.model.head.bias) for result in found)
    expected = server.model(IMAGES[:5])
    torch.testing.assert_close(torch.stack([result.logits for result in server.predict([])]), expected)


def test_a_server_keeps_the_images_of_a_step_that_fails(monkeypatch: pytest.MonkeyPatch):
    model = lively(SReT(exit_config()))
    server = Server(model, ExitPolicy(threshold=0.6), batch_size=4)
    server.submit(IMAGES)
    with monkeypatch.context() as broken:
        broken.setattr("sret.elastic.server.advance", lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                server.step()
    assert server.pending == len(IMAGES)
    assert sorted(result.number for result in server.predict([])) == list(range(len(IMAGES)))


def test_a_server_refuses_images_that_the_model_cannot_take():
    server = Server(lively(SReT(exit_config())), ExitPolicy(threshold=1))
    for images, text in (
        (IMAGES[..., 1:], r"this server takes \(batch, 3, 32, 32\)"),
        (IMAGES.float(), r"images of torch.float32 on cpu; this server takes torch.float64 on cpu"),
        (IMAGES.to("meta"), "images of torch.float64 on meta"),
    ):
        with pytest.raises(InputError, match=text):
            server.submit(images)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (4,)])
def test_images_of_another_shape_are_one_line(shape):
    model, images = lively(SReT(exit_config())), torch.zeros(shape)
    for call in (model.forward_exits, lambda x: predict_with_exits(model, x, ExitPolicy(threshold=1))):
        with pytest.raises(InputError, match="this model takes"):
            call(images)


@pytest.mark.parametrize("exits", KINDS)
def test_a_fused_model_has_the_same_logits_at_all_exits(exits, tmp_path: Path):
    model = lively(SReT(exit_config(exits)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.add_(0.02)
            module.running_var.mul_(1.2)
    fused = fuse(model)
    with torch.no_grad():
        expected = torch.stack(model.forward_exits(IMAGES))
        torch.testing.assert_close(torch.stack(fused.forward_exits(IMAGES)), expected)
    policy = ExitPolicy(threshold=float(expected[0].softmax(1).amax(1).sort().values[5:7].mean()))
    (logits, found), (fused_logits, same) = (predict_with_exits(net, IMAGES, policy) for net in (model, fused))
    assert found.tolist() == same.tolist()
    assert len(found.unique()) > 1
    torch.testing.assert_close(fused_logits, logits)
    preprocessing = Preprocessing(img_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    card = Card(config=model.config, preprocessing=preprocessing, is_fused=True, exit_policy=policy)
    save_weights(tmp_path / "w.safetensors", fused.float().state_dict(), card)
    loaded, stored = load_weights(tmp_path / "w.safetensors")
    assert stored == card
    assert all(map(torch.equal, loaded.forward_exits(IMAGES.float()), fused.forward_exits(IMAGES.float())))


@pytest.mark.slow
@pytest.mark.parametrize(("exits", "is_fused"), [("passes", False), ("passes", True), ("stages", True)])
def test_a_compiled_model_has_the_same_logits_at_all_exits(exits, is_fused):
    first, last = exit_config().stages
    stages = (replace(first, groups=(4,)), replace(last, num_blocks=1, groups=(2, 2)))
    model = lively(SReT(exit_config(exits, stages=stages))).float()
    model = fuse(model) if is_fused else model
    images = IMAGES.float()
    with torch.no_grad():
        expected = model.forward_exits(images)
        policy = ExitPolicy(threshold=float(expected[0].softmax(1).amax(1).sort().values[5:7].mean()))
        logits, found = predict_with_exits(model, images, policy)
        whole = torch.compile(model.forward_exits, backend="eager", fullgraph=True)(images)
        torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
        model.compile(backend="eager")
        torch.testing.assert_close(model.forward_exits(images), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(images), expected[-1], atol=1e-4, rtol=1e-4)
        compiled, same = predict_with_exits(model, images, policy)
        torch.testing.assert_close(compiled, logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(same, found)


@pytest.mark.parametrize("exits", KINDS)
def test_counted_costs_equal_the_formula(exits):
    model, cost = SReT(exit_config(exits)).eval(), model_cost(exit_config(exits))
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.macs == model_cost(exit_config("none")).macs
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model.forward_exits(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * cost.exit_macs[-1]
    assert len(cost.exit_macs) == model.config.num_exits + 1
    assert sorted(set(cost.exit_macs)) == list(cost.exit_macs)


@pytest.mark.parametrize("exits", KINDS)
@pytest.mark.parametrize("criterion", ["confidence", "agreement"])
def test_images_in_batches_leave_as_they_do_alone(exits, criterion):
    model = lively(SReT(exit_config(exits)))
    with torch.inference_mode():
        every = torch.stack(model.forward_exits(IMAGES))  # (exits, B, K)
    first, second = every[:2].softmax(2)
    scores = ExitPolicy(criterion=criterion, threshold=1).score(
        *((first, None, 0), (second, first, 1))[criterion != "confidence"]
    )
    ranked = scores.sort().values
    policy = ExitPolicy(criterion=criterion, threshold=float(ranked[5:7].mean()))  # half leave; nobody is near
    logits, found = predict_with_exits(model, IMAGES, policy)
    alone = [predict_with_exits(model, image[None], policy) for image in IMAGES]
    assert found.tolist() == [int(one[1]) for one in alone]
    assert len(set(found.tolist())) > 1 or (exits == "stages" and criterion == "agreement")  # the second is the last
    torch.testing.assert_close(logits, torch.cat([one[0] for one in alone]))

    torch.testing.assert_close(logits, every[found, torch.arange(len(IMAGES))])
    served = sorted(Server(model, policy, batch_size=4).predict(IMAGES.split(5)), key=lambda result: result.number)
    assert [result.exit for result in served] == found.tolist()
    torch.testing.assert_close(torch.stack([result.logits for result in served]), logits)


@pytest.mark.parametrize("exits", KINDS)
@pytest.mark.parametrize("criterion", ["confidence", "agreement"])
def test_thresholds_0_and_1_are_the_first_exit_and_the_model(exits, criterion):
    model = lively(SReT(exit_config(exits)))
    logits, found = predict_with_exits(model, IMAGES, ExitPolicy(criterion=criterion, threshold=1))
    assert found.unique().tolist() == [model.config.num_exits]
    assert torch.equal(logits, model(IMAGES))
    assert predict_with_exits(model, IMAGES, ExitPolicy(criterion=criterion, threshold=0))[1].max() <= 1


def test_agreement_compares_neighbours():
    policy = ExitPolicy(criterion="agreement", threshold=0.5)
    now, before = torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    assert policy.score(now, before, 1).tolist() == [0.75, 0.25]
    assert policy.leaves(now, None, 0).tolist() == [False, False]


def test_a_server_runs_full_batches_and_frees_what_left():
    model = lively(SReT(exit_config()))
    server = Server(model, ExitPolicy(threshold=0.6), batch_size=4)
    sizes: list[int] = []
    server.parts = [
        replace(part, run=lambda x, run=part.run: (sizes.append(len(x)), run(x))[1]) for part in server.parts
    ]
    results = []
    for image in IMAGES:
        server.submit(image[None])
        results += server.step()
    assert set(sizes) == {4}  # a part never ran on fewer
    assert server.pending == len(IMAGES) - len(results)
    while server.pending:
        results += server.step(is_final=True)
    assert sorted(result.number for result in results) == list(range(len(IMAGES)))
    assert server.step(is_final=True) == []
    server.submit(torch.cat([IMAGES, IMAGES]))
    while server.waiting[0]:  # deep parts run first, so that few wait in front of them
        server.step()
        assert all(sum(len(part.numbers) for part in parts) < 8 for parts in server.waiting[1:])


def test_all_exits_learn():
    for exits in KINDS:
        model = SReT(exit_config(exits)).train()
        logits = EveryExit(model)(IMAGES.float())
        assert logits.shape == (model.config.num_exits + 1, len(IMAGES), 5)
        targets = torch.eye(5)[torch.arange(len(IMAGES)) % 5]
        loss = timm.loss.SoftTargetCrossEntropy()(logits, targets)
        torch.testing.assert_close(
            loss, torch.stack([timm.loss.SoftTargetCrossEntropy()(y, targets) for y in logits]).mean()
        )
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.usefixtures("quick_report")
@pytest.mark.parametrize("is_compared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_trains_all_exits_and_resumes_exactly(tmp_path: Path, is_compared):
    recipe = replace(RECIPE, model=replace(RECIPE.model, exits="passes", drop_rate=0.1))
    states = []
    for max_steps in (1, 2):
        train(recipe, tmp_path / "run", resume="auto", max_steps=max_steps)
        states.append(load_file(tmp_path / "run" / LAST))
    first, second = ({key: value for key, value in state.items() if key.startswith("exits")} for state in states)
    assert len(first) == 2
    assert not [key for key, value in first.items() if torch.equal(value, second[key])]
    if is_compared:
        train(recipe, tmp_path / "whole", max_steps=2)
        assert all(torch.equal(value, states[1][key]) for key, value in load_file(tmp_path / "whole" / LAST).items())
    with pytest.raises(InputError, match="fsdp does not support"):
        make_accelerator(recipe, RuntimeConfig(fsdp=True), tmp_path / "sharded")


def test_early_exit_counts_and_knows_its_cost():
    model = lively(SReT(exit_config()))
    net = EarlyExit(model, ExitPolicy(threshold=1))
    net(IMAGES[:3])
    net(IMAGES)
    assert net.counts.tolist() == [0, 0, 0, 0, 0, 15]
    assert net.share_of_macs() == model_cost(model.config).exit_macs[-1] / model_cost(model.config).macs
    net = EarlyExit(model, ExitPolicy(threshold=0))
    net(IMAGES)
    assert net.share_of_macs() == model_cost(model.config).exit_macs[0] / model_cost(model.config).macs


@pytest.mark.parametrize("exits", KINDS)
def test_other_weights_leave_exits_as_they_are(exits):
    source, config = lively(SReT(exit_config("none"))), exit_config(exits)
    model = SReT(config).double()
    drawn = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("exit")}
    report = transfer(model, source.state_dict(), source.config)
    assert f"{config.num_exits} new classifiers for exits" in report
    assert all(torch.equal(model.state_dict()[key], value) for key, value in drawn.items())
    assert torch.equal(model.eval()(IMAGES), source(IMAGES))
    again = SReT(config).double().eval()
    assert not any("exits" in line for line in transfer(again, lively(model).state_dict(), config))
    assert all(
        torch.equal(*pair) for pair in zip(again.forward_exits(IMAGES), model.forward_exits(IMAGES), strict=True)
    )
    back = SReT(exit_config("none")).double().eval()
    transfer(back, model.state_dict(), config)
    assert torch.equal(back(IMAGES), model(IMAGES))


def test_a_new_classifier_renews_the_exits():
    model = SReT(exit_config()).eval()
    model.reset_classifier(3)
    assert [tuple(y.shape) for y in model.forward_exits(IMAGES.float())] == [(12, 3)] * 6
    model.reset_classifier(0)
    assert model.config.exits == "none"
    assert not [key for key in model.state_dict() if key.startswith("exit")]
    assert model(IMAGES.float()).shape == (12, 32)
    features = timm.create_model("sret_t", img_size=64, exits="passes", features_only=True)
    assert not [name for name, _ in features.named_parameters() if "exit" in name]


def test_files(tmp_path: Path):
    preprocessing = Preprocessing(img_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    for exits in ("none", *KINDS):
        model = SReT(exit_config(exits)).eval()
        save_weights(
            tmp_path / "w.safetensors", model.state_dict(), Card(config=model.config, preprocessing=preprocessing)
        )
        loaded, card = load_weights(tmp_path / "w.safetensors")
        assert card.config == model.config
        assert torch.equal(loaded(IMAGES.float()), model(IMAGES.float()))
        with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
            names = json.loads(file.metadata()[METADATA_KEY])["config"]
        assert ("exits" in names) == (exits != "none")  # other files are as before
    policy = ExitPolicy(criterion="agreement", threshold=0.25)
    stored = replace(card, exit_policy=policy)
    assert Card.from_json(stored.to_json()) == stored
    with pytest.raises(InputError, match="threshold is 2"):
        Card.from_json(stored.to_json().replace("0.25", "2"))
    with pytest.raises(InputError, match="the model has no exits"):
        replace(stored, config=exit_config("none"))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ExitPolicy(threshold=1.5), r"threshold is 1\.5; it must be a number >= 0 and <= 1"),
        (lambda: ExitPolicy(criterion="luck", threshold=0.5), "criterion is 'luck'; it must be one of confidence"),
        (lambda: predict_with_exits(SReT(small_config()).eval(), IMAGES, ExitPolicy(threshold=0.5)), "has no exits"),
        (lambda: SReT(small_config()).forward_exits(IMAGES), "has no exits; train one with exits"),
        (lambda: predict_with_exits(SReT(exit_config()), IMAGES, ExitPolicy(threshold=0.5)), "model.eval"),
        (lambda: exit_config(memory="pass"), "memory 'pass' does not keep; set memory to none, or exits to stages"),
        (lambda: exit_config(reversible=True), "set reversible to false"),
        (lambda: exit_config(num_classes=0), "num_classes is 0; set exits to none"),
        (lambda: SReT(exit_config("stages", stages=exit_config().stages[:1])), "needs two stages or more"),
        (lambda: exit_config("luck"), "exits is 'luck'; it must be one of none, passes, stages"),
        (lambda: SReT(exit_config()).set_grad_checkpointing(), "set memory to none"),
        (lambda: to_official(SReT(exit_config()).state_dict(), exit_config()), "the authors' format has no exits"),
        (lambda: Server(SReT(exit_config()).eval(), ExitPolicy(threshold=1)).submit(IMAGES[..., 1:]), "this server"),
    ],
)
def test_wrong_input_is_one_line(make, text):
    with pytest.raises(InputError, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)
