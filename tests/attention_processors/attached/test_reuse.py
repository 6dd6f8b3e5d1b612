"""Reuse, the method that remembers, from step to step of a run, on tiny models."""

import threading
from copy import deepcopy

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from support import hunyuan
from support.wan import LAYERS, PIPELINES, forward, generate, inputs, pipeline, transformer
from torch import nn

from gen_accel import BlockMixture, Radial, Reuse, Schedule, SparseLinear, attach, estimate
from gen_accel.attention_processors.attached import step_state
from gen_accel.attention_processors.methods import reuse

INNER = SparseLinear(critical=0.2, block_q=16, block_k=16)
PLAIN, RESIDUAL = Reuse(INNER, residual=False), Reuse(INNER)
SIZE = (3, 10, 14)  # latents, 3 x 5 x 7 tokens
TWO = Schedule(dense_steps=2)

pytestmark = pytest.mark.usefixtures("one_thread")


def timeless():
    """A model that does not know the time, so that steps with equal latents are equal."""
    model = transformer()
    last = model.condition_embedder.time_embedder.linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return model


@torch.no_grad()
def run(model, *times, **options):
    """Outputs of one pass at each time."""
    return [forward(model, *options.pop("size", SIZE), time=time, **options) for time in times]


def steps(handle, layer="blocks.0"):
    """Why each step was dense, in order; "" where it was not."""
    found = {step: r for (name, step), r in handle.records.items() if name.endswith(layer)}
    return [found[step].why_dense or "" for step in sorted(found)]


def learned(handle):
    """What is remembered: by layer, a memory for each pass of a step."""
    kept = {}
    for of_pass in handle.states._kept.values():
        for layer, one in of_pass.items():
            kept.setdefault(layer, []).append([part.state for part in one.parts])
    return kept


# What runs


@pytest.mark.parametrize(
    ("method", "schedule"),
    [(Reuse(INNER, every=1), Schedule()), (RESIDUAL, Schedule(dense_start=1.0))],
    ids=["every", "schedule"],
)
def test_dense_at_every_step_is_stock_bit_for_bit(method, schedule):
    stock = generate(pipeline(), 3)
    pipe = pipeline()
    with attach(pipe, method, schedule=schedule, padding_once=False) as handle:
        assert torch.equal(generate(pipe, 3), stock)
        assert handle.summary().density is None


@pytest.mark.parametrize("inner", [INNER, Radial(decay_factor=0.1, block=16)], ids=["own", "grid"])
@pytest.mark.parametrize("residual", [True, "cpu"])
def test_a_sparse_step_after_a_dense_one_on_equal_input_is_dense(inner, residual):
    model = timeless()
    stock = run(model, 900.0)[0]
    with attach(model, Reuse(inner, residual=residual)) as handle:
        dense, sparse = run(model, 900.0, 800.0)
        assert steps(handle) == ["nothing remembered", ""]
        assert 0 < handle.summary().density < 1
    assert torch.equal(dense, stock)
    torch.testing.assert_close(sparse, stock, rtol=0, atol=2e-6)
    if inner is INNER:
        with attach(model, Reuse(inner, residual=False)):
            assert (run(model, 900.0, 800.0)[1] - stock).abs().max() > 1e-3


def test_the_pattern_is_made_once_and_lasts(monkeypatch):
    made = []
    monkeypatch.setattr(reuse, "block_mass", lambda *a, **k: made.append(1) or mass(*a, **k))
    pipe, plans = pipeline(), []
    with attach(pipe, PLAIN, schedule=TWO) as handle:
        note = pipe.transformer.register_forward_hook(lambda *_: plans.append(learned(handle)))
        generate(pipe, 6)
        note.remove()
        assert steps(handle) == ["first steps"] * 2 + [""] * 4
        summary = handle.summary()
        assert (summary.learned, summary.reused) == ([1], [2, 3, 4, 5])
        assert "learned at 1 steps (1), reused at 4 steps (2-5)" in str(summary)
        assert summary.to_dict()["learned_steps"] == [1]
        assert not learned(handle), "nothing is left when the last step is over"
    assert len(made) == LAYERS * 2  # calls of guidance
    held = [
        plan for of_layer in plans[5].values() for [memory] in of_layer if (plan := memory.plan)
    ]
    assert len(held) == LAYERS * 2
    assert not any(plan.dynamic for plan in held)


mass = reuse.block_mass


def test_every_so_many_steps_it_learns_anew():
    pipe = pipeline()
    with attach(pipe, Reuse(INNER, every=2), schedule=TWO) as handle:
        generate(pipe, 7)
        kinds = ["first steps", "first steps", "", "refreshed", "", "refreshed", ""]
        assert steps(handle) == kinds
        assert handle.summary().learned == [1, 3, 5]
        assert handle.summary().reused == [2, 4, 6]


def test_the_last_steps_may_be_dense_too():
    pipe = pipeline()
    with attach(pipe, RESIDUAL, schedule=Schedule(dense_start=0.2, dense_end=0.2)) as handle:
        generate(pipe, 5)
        assert steps(handle) == ["nothing remembered", "first steps", "", "", "last steps"]
        assert handle.summary().learned == [0, 1]


def test_layers_that_have_no_residual():
    pipe = pipeline()
    with attach(pipe, Reuse(INNER, layers=(1,))) as handle:
        run(pipe.transformer, 900.0)
        kept = learned(handle)
    first, second = (kept[f"transformer.blocks.{i}"][0][0] for i in range(2))
    assert first.residual is None
    assert second.residual is not None
    assert first.plan is not None


def test_layers_that_the_model_lacks_are_refused():
    model, method = pipeline().transformer, Reuse(INNER, layers=(0, 99))
    why = "^layers of Reuse must name blocks that attend over the grid, 0 to 1 here, got 99$"
    stock = [block.attn1.processor for block in model.blocks]
    with pytest.raises(ValueError, match=why):
        attach(model, method)
    assert [block.attn1.processor for block in model.blocks] == stock
    with pytest.raises(ValueError, match=why):
        estimate(model, method, height=80, width=112, num_frames=9)


# Whose it is


def fresh(method, prompt, **options):
    pipe = pipeline()
    with attach(pipe, method, schedule=TWO):
        return generate(pipe, 4, prompt=prompt, **options)


def test_two_prompts_in_a_row_do_not_see_each_other():
    pipe = pipeline()
    with attach(pipe, RESIDUAL, schedule=TWO):
        generate(pipe, 4, prompt="a blue circle")
        second = generate(pipe, 4)
        longer = generate(pipe, 4, num_frames=13)
    assert torch.equal(second, fresh(RESIDUAL, "a red square moves right"))
    assert torch.equal(longer, fresh(RESIDUAL, "a red square moves right", num_frames=13))


def test_two_pipelines_in_two_threads_do_not_see_each_other():
    prompts = ["a red square moves right", "a blue circle"]
    found, pipes = {}, [pipeline() for _ in prompts]  # weights are drawn one after the other

    def work(prompt, pipe):
        with attach(pipe, RESIDUAL, schedule=TWO):
            found[prompt] = generate(pipe, 4, prompt=prompt)

    both = zip(prompts, pipes, strict=True)
    threads = [threading.Thread(target=work, args=args) for args in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt in prompts:
        assert torch.equal(found[prompt], fresh(RESIDUAL, prompt))


def test_a_method_holds_nothing_and_a_copy_of_the_model_knows_nothing():
    model = timeless()
    with attach(model, RESIDUAL) as handle:
        run(model, 900.0)
        assert Reuse(INNER) == RESIDUAL
        assert vars(RESIDUAL).keys() == vars(Reuse(INNER)).keys()
        assert learned(handle)
        twin = deepcopy(model)
        copied = twin.blocks[0].attn1.processor.owner
        assert copied is not handle
        assert not learned(copied)


@pytest.mark.parametrize("change", ["size", "batch", "dtype"])
def test_what_no_longer_fits_is_learned_anew(change):
    model = timeless()
    with attach(model, RESIDUAL) as handle:
        run(model, 900.0, 800.0)
        other = {"size": (4, 10, 14)} if change == "size" else {}
        other |= {"batch": 1} if change == "batch" else {}
        if change == "dtype":
            model.double()
            with torch.no_grad():
                doubled = {k: x.double() for k, x in inputs(*SIZE, time=700.0).items()}
                out = model(**doubled, return_dict=False)[0]
        else:
            out = run(model, 700.0, **other)[0]
        assert steps(handle)[:2] == ["nothing remembered", ""]
        assert steps(handle)[2] == "another size than what is remembered"
    if change != "dtype":
        assert torch.equal(out, run(model, 700.0, **other)[0])


def test_an_exception_in_the_run_forgets():
    model = timeless()
    with attach(model, RESIDUAL) as handle:
        run(model, 900.0, 800.0)

        def fail(*_):
            raise RuntimeError("broken")

        hook = model.blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken"):
            run(model, 700.0)
        hook.remove()
        run(model, 600.0, 500.0)
        assert steps(handle) == ["nothing remembered", "", "", "nothing remembered", ""]


def test_detaching_and_a_new_run_forget():
    model = timeless()
    handle = attach(model, RESIDUAL)
    run(model, 900.0, 800.0)
    run(model, 950.0)  # time does not rise in a run
    assert steps(handle) == ["nothing remembered"]
    assert handle.summary().learned == [0]
    assert learned(handle)
    handle.detach()
    assert not learned(handle)


def test_a_run_that_is_resumed_is_dense_once():
    """By another process, which knows nothing, in the middle of the scheduler's steps."""
    pipe = pipeline()
    pipe.scheduler.set_timesteps(6)
    pipe.scheduler.set_begin_index(0)
    times = pipe.scheduler.timesteps.tolist()
    with attach(pipe, RESIDUAL, schedule=TWO) as handle:
        latents = inputs(*SIZE)["hidden_states"]
        for i in (3, 4, 5):
            pipe.scheduler._step_index = i
            with torch.no_grad():
                given = inputs(*SIZE, time=times[i]) | {"hidden_states": latents}
                pipe.transformer(**given)
        assert [step for _, step in handle.records][::LAYERS] == [3, 4, 5]
        assert steps(handle) == ["nothing remembered", "", ""]


def test_a_run_that_begins_in_the_middle():
    pipe = PIPELINES["video"]()
    with attach(pipe, RESIDUAL, schedule=Schedule(dense_start=0.2)) as handle:
        generate(pipe, 10, strength=0.5)
        assert steps(handle) == ["nothing remembered", "first steps", *[""] * 3]
        assert handle.summary().learned == [0, 1]


# Guidance and batches


def test_each_branch_of_guidance_has_its_own():
    for guidance in ("own", "shared"):
        pipe, kept = pipeline(), []
        with attach(pipe, Reuse(INNER, guidance=guidance), schedule=TWO) as handle:
            note = pipe.transformer.register_forward_hook(lambda *_: kept.append(learned(handle)))  # noqa: B023
            generate(pipe, 4)
            note.remove()
        first, second = (one[0] for one in kept[3]["transformer.blocks.1"])
        assert (first.plan is second.plan) == (guidance == "shared")
        assert not torch.equal(first.residual, second.residual)


def test_without_guidance_there_is_one():
    pipe, kept = pipeline(), []
    with attach(pipe, RESIDUAL, schedule=TWO) as handle:
        note = pipe.transformer.register_forward_hook(lambda *_: kept.append(learned(handle)))
        generate(pipe, 4, guidance_scale=1.0)
        note.remove()
    assert [len(of_layer) for of_layer in kept[2].values()] == [1] * LAYERS


def test_guidance_that_ends_early_leaves_the_other_branch_its_own():
    model = timeless()
    with attach(model, RESIDUAL) as handle:
        stock = run(model, 900.0)[0]
        other = inputs(*SIZE, time=900.0)
        other["encoder_hidden_states"] = -other["encoder_hidden_states"]
        with torch.no_grad():
            model(**other)
        sparse = run(model, 800.0)[0]
        assert [len(of_layer) for of_layer in learned(handle).values()] == [2] * LAYERS
    torch.testing.assert_close(sparse, stock, rtol=0, atol=2e-6)


def test_more_passes_in_a_step_than_are_remembered_run_dense():
    model = timeless()
    stock = run(model, 900.0)[0]
    with attach(model, RESIDUAL) as handle:
        for time in (900.0, 800.0):
            outs = run(model, *[time] * (step_state.MOST_PASSES + 1))
            assert torch.equal(outs[-1], stock)
        kept = learned(handle)
        assert [len(of_layer) for of_layer in kept.values()] == [step_state.MOST_PASSES] * LAYERS


def test_samples_of_a_batch_are_apart():
    model, times = timeless(), (900.0, 800.0)
    given = [inputs(*SIZE, batch=3, time=time) for time in times]
    for one in given:
        one["hidden_states"] = (
            one["hidden_states"] * one["timestep"][:, None, None, None, None] / 900
        )
    with torch.no_grad(), attach(model, PLAIN):
        together = [model(**one, return_dict=False)[0] for one in given]
        for row in range(3):
            attach(model, PLAIN)
            alone = [
                model(**{k: x[row : row + 1] for k, x in one.items()}, return_dict=False)[0]
                for one in given
            ]
            torch.testing.assert_close(together[1][row : row + 1], alone[1], rtol=0, atol=2e-6)


def test_texts_of_several_lengths_have_memories_of_their_own():
    model = hunyuan.transformer(num_layers=1, num_single_layers=1)
    given = hunyuan.inputs(*SIZE)
    given["encoder_attention_mask"] = given["encoder_attention_mask"].clone()
    given["encoder_attention_mask"][0, 2:] = 0
    with torch.no_grad(), attach(model, RESIDUAL) as handle:
        stock = model(**given, return_dict=False)[0]
        given["timestep"] = given["timestep"] - 1e-3
        sparse = model(**given, return_dict=False)[0]
        assert {len(one) for of_layer in learned(handle).values() for one in of_layer} == {2}
        assert 0 < handle.summary().density < 1
    torch.testing.assert_close(sparse, stock, rtol=0, atol=2e-3)


# With what else is there


def test_a_block_that_a_cache_skips_keeps_what_it_knows():
    pipe = pipeline(transformer=transformer(num_layers=3))
    plain = generate(pipe, 6)
    with attach(pipe, RESIDUAL, schedule=TWO) as handle:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.25))
        cached = generate(pipe, 6)
        first, second = (steps(handle, f"blocks.{i}") for i in (0, 1))
        assert len(second) < len(first) == 6, "some were skipped"
        assert handle.explain(5)
    assert torch.isfinite(cached).all()
    assert not torch.equal(cached, plain)


@pytest.mark.slow
def test_compiled_blocks_answer_as_others_do():
    eager, compiled = pipeline(), pipeline()
    with attach(eager, RESIDUAL, schedule=TWO):
        want = generate(eager, 4)
    with attach(compiled, RESIDUAL, schedule=TWO) as handle:
        compiled.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        out = generate(compiled, 4)
        assert handle.summary().learned == [1]
        assert handle.summary().reused == [2, 3]
    torch.testing.assert_close(out, want, rtol=0, atol=1e-4)
    torch.compiler.reset()


def test_one_graph_of_the_whole_model_is_refused():
    model = transformer()
    with attach(model, RESIDUAL):
        model.compile(fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="a schedule of steps, or a method"):
            run(model, 900.0)
    torch.compiler.reset()


def test_training_through_a_residual_is_refused_and_through_the_pattern_goes():
    model = transformer()
    with (
        attach(model, RESIDUAL),
        pytest.raises(ValueError, match=r"^Reuse: a residual of an earl"),
    ):
        forward(model, *SIZE)
    with attach(model, PLAIN) as handle:
        forward(model, *SIZE).square().mean().backward()
        grads = [p.grad.clone() for p in model.blocks.parameters() if p.grad is not None]
        assert grads
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert not learned(handle), "a gradient has nothing to do with other steps"
        model.zero_grad()
        model.enable_gradient_checkpointing()
        forward(model, *SIZE).square().mean().backward()
        again = [p.grad for p in model.blocks.parameters() if p.grad is not None]
    for one, other in zip(grads, again, strict=True):
        assert torch.equal(one, other)


# Memory


def test_more_than_there_is_room_for_is_refused_before_anything_is_kept(monkeypatch):
    one = 3 * 5 * 7 * 32 * 4 * LAYERS  # tokens, channels, bytes, layers
    pipe = pipeline()
    with attach(pipe, RESIDUAL, schedule=TWO) as handle:
        monkeypatch.setattr(step_state, "free_bytes", lambda device: 2 * one - 1)
        with pytest.raises(
            ValueError, match=r"^Reuse has to remember 2 x 0\.0 MB, .* 0\.1 MB are"
        ):
            generate(pipe, 4)
        assert not learned(handle)
        assert not handle.summary().learned
        generate(pipe, 4, guidance_scale=1.0)  # once is room enough
        monkeypatch.setattr(step_state, "free_bytes", lambda device: 2 * one)
        generate(pipe, 4)
    with attach(pipe, PLAIN, schedule=TWO):
        monkeypatch.setattr(step_state, "free_bytes", lambda device: 0)
        generate(pipe, 3)


def test_what_is_free_is_known_here():
    free = step_state.free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 1 << 50
    assert step_state.free_bytes(torch.device("meta")) is None


def test_a_mixture_by_its_layers():
    """Layers that have methods of their own are reused as such."""
    model = timeless()
    mixture = BlockMixture(chunks=(3, 4, 6), select="topk", scope="query_head", topk=(1, 2, 2))
    stock = run(model, 900.0)[0]
    with attach(model, Reuse(mixture)) as handle:
        sparse = run(model, 900.0, 800.0)[1]
        plans = [one[0][0].plan for one in learned(handle).values()]
    assert len({len(plan.slots) // plan.block_k for plan in plans}) == LAYERS
    torch.testing.assert_close(sparse, stock, rtol=0, atol=2e-6)
