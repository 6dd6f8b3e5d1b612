"""Objectives of training on a tiny Wan, and a batch for them."""

import warnings
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from types import SimpleNamespace

import torch
from support import finetuning as ft
from support import wan

import gen_accel
from gen_accel.attention_processors.attached.attachment import SilentBranch
from gen_accel.attention_processors.attached.recipe import (
    Recipe,
)
from gen_accel.attention_processors.families import family_named
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.lora.adapters import active
from gen_accel.lora.artefact import add_lora
from gen_accel.lora.objective import Objective


def built(kind, method="sparse_linear", settings=ft.SPARSE, seed=0, guidance=1.0, **fields):
    """The objective with a LoRA that says something, and the model as it came."""
    given = ft.config("unused", method=method, settings=settings, **fields)
    transformer = wan.transformer(seed)
    stock = deepcopy(transformer)
    transformer.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SilentBranch)
        handle = gen_accel.attach(transformer, method_from(method, settings))
    add_lora(transformer, given, some_recipe(given))
    for branch in handle.branches.values():
        branch.requires_grad_(True)

    @contextmanager
    def teaching():
        with handle.paused(), active(transformer, None):
            yield

    alone = SimpleNamespace(modules={}, showing=nullcontext, teaching=teaching)
    return Objective(transformer, family_named("wan"), kind, alone, guidance=guidance), stock


def some_recipe(given):
    empty = {"base_model": "x", "part": "transformer", "method": "dense"}
    empty |= {"transformer": {"class": "WanTransformer3DModel"}}
    empty |= {"options": {}, "schedule": {}, "rope": "none", "trained_frames": None, "frames": 9}
    empty |= {"height": 8, "width": 8, "stages": (), "steps": 1, "rank": given.rank, "alpha": 1.0}
    return Recipe(**empty, targets=given.targets, objective="distill", data="")


def say_something(objective):
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))


def batch(count=2, frames=3):
    clips = ft.Clips()
    clean = torch.stack([clips.latents(i, frames) for i in range(count)])
    g = torch.Generator().manual_seed(3)
    noise, sigma = torch.randn(clean.shape, generator=g), torch.rand(count, generator=g)
    text = torch.stack([clips.conditions(i)["encoder_hidden_states"] for i in range(count)])
    return clean, noise, sigma, {"encoder_hidden_states": text}
