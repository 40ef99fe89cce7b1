"""Trains a model whose blocks were shared to predict what the original predicts"""
