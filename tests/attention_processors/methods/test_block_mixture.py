"""Block mixture: chunks and picks held to slow loops, and what it does on a live model."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from support.checks import assert_no_worse
from support.wan import forward, generate, gradients, pipeline, processors, transformer

from gen_accel import BlockMixture, Schedule, VideoShape, attach, attention
from gen_accel.attention_processors.methods import block_mixture as picking
from gen_accel.attention_processors.methods.registry import method_of_file, saved_options
from gen_accel.attention_processors.seam import SparseProcessor
from gen_accel.kernels import reference
from gen_accel.memory import PLAN_CACHE
from gen_accel.plan import unpack

CPU = torch.device("cpu")
RAGGED = VideoShape(5, 6, 7, text=3)  # no chunk below divides it
SMALL = VideoShape(3, 4, 3, text=2)
CHUNKS = {"1d": 2, "2d": (4, 3), "3d": (2, 4, 3)}
SELECTIONS = [
    *(("threshold", scope) for scope in ("query_head", "head_global", "overall", "block")),
    *(("topk", scope) for scope in ("query_head", "head_global", "overall")),
]
ATTACHED = BlockMixture(chunk_1d=2, chunk_2d=(4, 3), chunk_3d=(2, 4, 3), threshold=0.3, block=16)


def method_of(partition, **options):
    chunk = {f"chunk_{partition}": CHUNKS[partition]}
    return BlockMixture(**({"partition": partition, "block": 8} | chunk | options))


def sides_of(partition, video):
    chunk = CHUNKS[partition]
    return {
        "1d": (chunk, video.height, video.width),
        "2d": (video.frames, *(chunk if partition == "2d" else (1, 1))),
        "3d": chunk,
    }[partition]


def random_qk(video, batch=2, heads=2, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, video.tokens, dim, generator=g) for _ in range(2)]


def pairs_of(plan):
    """(B or 1, H or 1, N, N) bool, which tokens see which."""
    rows = unpack(reference.pairs(plan), plan)
    return unpack(rows.transpose(-1, -2), plan).transpose(-1, -2)


# The definition, in loops


def chunk_of_each(video, sides):
    """The chunk of each video token, counted in raster order of the chunks."""
    places = product(*map(range, video.grid))
    names = [tuple(x // side for x, side in zip(p, sides, strict=True)) for p in places]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return [numbers[name] for name in names]


def taken(method, scores, home, topk):
    """What one scope takes of its entries (head, row, chunk), which `scores` maps to a score."""
    own = [entry for entry in scores if home[entry[1]] == entry[2]]
    others = sorted((e for e in scores if home[e[1]] != e[2]), key=lambda e: -scores[e])
    if method.select == "topk":
        queries = len({entry[:2] for entry in scores})
        return own + others[: max(topk * queries - len(own), 0)]
    if method.threshold == 1:
        return list(scores)
    low, high = min(scores.values()), max(scores.values())
    weight = {e: (score - low) / (high - low) for e, score in scores.items()}
    wanted = method.threshold * sum(weight.values())
    held, found = sum(weight[e] for e in own), list(own)
    for entry in others:
        if len(found) > len(own) and held >= wanted:
            break
        found.append(entry)
        held += weight[entry]
    return found


def pairs_by_loops(method, q, k, video, sides, row=1):
    """(B, H, N, N) bool. `row`: tokens of a chunk that pick together, by their mean query."""
    B, H, N, _ = q.shape
    chunk = chunk_of_each(video, sides)
    members = [[t for t, c in enumerate(chunk) if c == i] for i in range(max(chunk) + 1)]
    rows = [m[i : i + row] for m in members for i in range(0, len(m), row)]
    home = [chunk[tokens[0]] for tokens in rows]
    topk = method.topk[("1d", "2d", "3d").index(method.partition)]
    scope_of = {
        "query_head": lambda h, r, c: (h, r),
        "head_global": lambda h, r, c: h,
        "overall": lambda h, r, c: 0,
        "block": lambda h, r, c: c,
    }[method.scope]
    pairs = torch.zeros(B, H, N, N, dtype=torch.bool)
    pairs[:, :, len(chunk) :], pairs[..., len(chunk) :] = True, True
    for b in range(B):
        scopes: dict = {}
        for h in range(H):
            keys = torch.stack([k[b, h, m].double().mean(0) for m in members])
            queries = torch.stack([q[b, h, tokens].double().mean(0) for tokens in rows])
            products = (queries @ keys.T).tolist()
            for r, c in product(range(len(rows)), range(len(members))):
                scopes.setdefault(scope_of(h, r, c), {})[h, r, c] = products[r][c]
        for scores in scopes.values():
            for h, r, c in taken(method, scores, home, topk):
                for token in rows[r]:
                    pairs[b, h, token, members[c]] = True
    return pairs


class TestChunks:
    @pytest.mark.parametrize("partition", CHUNKS)
    @pytest.mark.parametrize(
        "video",
        [RAGGED, SMALL, VideoShape(1, 1, 1), VideoShape(1, 5, 1, text=9), VideoShape(7, 4, 6)],
        ids=str,
    )
    def test_members_are_those_of_the_grid(self, partition, video):
        """A chunk's tokens fill blocks of their own, each token once, in raster order."""
        layout = method_of(partition).layout(video, CPU)
        want = chunk_of_each(video, sides_of(partition, video))
        of_token = layout.chunk[layout.slots.places]
        assert of_token[: video.video_tokens].tolist() == want
        assert (of_token[video.video_tokens :] == max(want) + 1).all()
        assert layout.sizes.tolist() == [want.count(c) for c in range(max(want) + 1)]
        held = layout.slots.slots[layout.slots.real]
        assert sorted(held.tolist()) == list(range(video.tokens))
        for tokens, chunks in zip(
            layout.slots.slots.view(-1, layout.slots.block_q),
            layout.chunk.view(-1, layout.slots.block_q),
            strict=True,
        ):
            assert len(chunks.unique()) == 1
            assert (tokens >= 0).any()
            real = tokens[tokens >= 0].tolist()
            assert real == sorted(real)
        assert layout.slots.block_q <= 8

    @pytest.mark.parametrize(("partition", "chunks"), [("1d", 8), ("2d", 48), ("3d", 72)])
    def test_the_papers_video_gets_the_papers_chunks(self, partition, chunks):
        layout = BlockMixture(partition=partition).layout(VideoShape(24, 36, 64), CPU)
        assert len(layout.sizes) == chunks
        assert layout.sizes.max() < 1.5 * layout.sizes.min()

    @pytest.mark.slow
    @pytest.mark.parametrize("video", [RAGGED, VideoShape(1, 1, 1), VideoShape(21, 30, 52)])
    @pytest.mark.parametrize("chunks", [(1, 1, 1), (3, 7, 11), (10**6,) * 3], ids=str)
    @pytest.mark.parametrize("partition", CHUNKS)
    def test_without_sizes_as_many_chunks_as_asked_for(self, partition, video, chunks):
        i = ("1d", "2d", "3d").index(partition)
        layout = BlockMixture(partition=partition, chunks=chunks).layout(video, CPU)
        most = (video.frames, video.height * video.width, video.video_tokens)[i]
        assert layout.sizes.sum() == video.video_tokens
        assert min(chunks[i], most) / 2 <= len(layout.sizes) <= 2 * chunks[i]

    def test_chunks_larger_than_the_grid_are_one_chunk(self):
        for partition, chunk in {"1d": 99, "2d": (99, 99), "3d": (99, 99, 99)}.items():
            method = BlockMixture(partition=partition, **{f"chunk_{partition}": chunk})
            assert method.layout(RAGGED, CPU).sizes.tolist() == [5 * 6 * 7]
            assert pairs_of(method.plan(RAGGED)).all()


class TestPicks:
    @pytest.mark.parametrize(("select", "scope"), SELECTIONS)
    @pytest.mark.parametrize("partition", CHUNKS)
    def test_they_equal_the_loops(self, partition, select, scope):
        method = method_of(partition, select=select, scope=scope, topk=(2, 3, 5))
        q, k = random_qk(RAGGED)
        plan = method.plan_for(q, k, video=RAGGED)
        want = pairs_by_loops(method, q, k, RAGGED, sides_of(partition, RAGGED))
        assert torch.equal(pairs_of(plan), want)
        assert plan.density == pytest.approx(want.double().mean().item(), abs=1e-12)
        assert plan.computed_density >= plan.density

    @pytest.mark.slow
    @pytest.mark.parametrize(("select", "scope"), SELECTIONS)
    @pytest.mark.parametrize("threshold", [0.05, 0.6, 0.99])
    def test_counting_in_bins_equals_the_loops(self, select, scope, threshold, monkeypatch):
        """The way of long scopes, which are otherwise those of whole videos."""
        monkeypatch.setattr(picking, "SORTED", 0)
        method = method_of(
            "3d", chunk_3d=(1, 3, 2), select=select, scope=scope, threshold=threshold
        )
        q, k = random_qk(SMALL, batch=1)
        want = pairs_by_loops(method, q, k, SMALL, (1, 3, 2))
        assert torch.equal(pairs_of(method.plan_for(q, k, video=SMALL)), want)

    @pytest.mark.parametrize(("select", "scope"), SELECTIONS)
    def test_whole_blocks_pick_by_their_mean_query(self, select, scope):
        method = method_of("3d", routing="block", select=select, scope=scope, topk=(2, 3, 5))
        q, k = random_qk(RAGGED)
        plan = method.plan_for(q, k, video=RAGGED)
        assert plan.partial is None
        sides = sides_of("3d", RAGGED)
        want = pairs_by_loops(method, q, k, RAGGED, sides, row=plan.block_q)
        assert torch.equal(pairs_of(plan), want)

    @pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e15])
    def test_they_do_not_depend_on_the_scale_of_the_queries(self, scale):
        q, k = random_qk(RAGGED)
        for scope in ("query_head", "head_global"):
            method = method_of("3d", scope=scope)
            want = pairs_by_loops(method, q * scale, k, RAGGED, sides_of("3d", RAGGED))
            assert torch.equal(pairs_of(method.plan_for(q * scale, k, video=RAGGED)), want)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_every_dtype_is_scored_in_fp32(self, dtype):
        method = method_of("3d")
        q, k = (x.bfloat16() for x in random_qk(RAGGED))
        want = pairs_by_loops(method, q, k, RAGGED, sides_of("3d", RAGGED))
        plan = method.plan_for(q.to(dtype), k.to(dtype), video=RAGGED)
        assert torch.equal(pairs_of(plan), want)

    @pytest.mark.parametrize("scope", ["query_head", "head_global", "overall"])
    @pytest.mark.parametrize("partition", CHUNKS)
    def test_nothing_but_the_own_chunk_is_attention_inside_the_chunks(self, partition, scope):
        """Where the public code attends to everything."""
        video = VideoShape(5, 6, 7)
        q, k = random_qk(video)
        v = random_qk(video, seed=1)[0]
        method = method_of(partition, select="topk", scope=scope, topk=(1, 1, 1))
        out = attention(q, k, v, video=video, method=method)
        chunk = torch.tensor(chunk_of_each(video, sides_of(partition, video)))
        for c in chunk.unique():
            inside = [x[:, :, chunk == c] for x in (q, k, v)]
            exact = F.scaled_dot_product_attention(*(x.double() for x in inside))
            low = F.scaled_dot_product_attention(*inside)
            assert_no_worse(out[:, :, chunk == c], low, exact)

    @pytest.mark.parametrize("scope", ["query_head", "head_global", "overall", "block"])
    def test_the_least_threshold_takes_one_of_each_scope(self, scope):
        q, k = random_qk(RAGGED)
        method = method_of("3d", scope=scope, threshold=1e-12)
        pairs = pairs_of(method.plan_for(q, k, video=RAGGED))[:, :, :210, :210]
        chunk = torch.tensor(chunk_of_each(RAGGED, sides_of("3d", RAGGED)))
        seen = torch.stack([pairs[..., chunk == c].any(-1) for c in range(18)], -1)
        beyond = seen & (chunk[:, None] != torch.arange(18))
        scopes = {"query_head": 2 * 2 * 210, "head_global": 2 * 2, "overall": 2, "block": 2 * 18}
        assert beyond.sum() == scopes[scope]

    @pytest.mark.parametrize(
        "options",
        [
            *({"scope": s, "threshold": 1} for s in ("query_head", "head_global", "overall")),
            {"scope": "block", "threshold": 1.0},
            {"select": "topk", "topk": (3, 6, 18)},
            {"select": "topk", "scope": "overall", "topk": (99, 99, 99)},
            {"threshold": 1.0, "routing": "block"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("partition", CHUNKS)
    def test_all_of_it_is_dense_attention(self, partition, options):
        q, k = random_qk(RAGGED)
        v = random_qk(RAGGED, seed=1)[0]
        method = method_of(partition, **options)
        assert method.plan_for(q, k, video=RAGGED).density == 1
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        out = attention(q, k, v, video=RAGGED, method=method)
        assert_no_worse(out, F.scaled_dot_product_attention(q, k, v), exact)

    @pytest.mark.parametrize(("select", "scope"), SELECTIONS)
    def test_scores_that_are_equal_go_together(self, select, scope):
        q, k = random_qk(RAGGED)
        method = method_of("3d", select=select, scope=scope, topk=(2, 2, 2))
        assert pairs_of(method.plan_for(q, torch.zeros_like(k), video=RAGGED)).all()

    @pytest.mark.parametrize(("select", "scope"), SELECTIONS)
    @pytest.mark.parametrize("routing", ["token", "block"])
    def test_text_sees_all_and_is_seen_by_all(self, routing, select, scope):
        q, k = random_qk(RAGGED)
        k[:, :, -3:] = -100 * q[:, :, -3:]  # what a choice would never take
        method = method_of("3d", routing=routing, select=select, scope=scope, topk=(1, 1, 1))
        pairs = pairs_of(method.plan_for(q, k, video=RAGGED))
        assert pairs[..., -3:].all()
        assert pairs[:, :, -3:].all()
        assert not pairs.all()

    @pytest.mark.parametrize(("select", "scope"), SELECTIONS)
    @pytest.mark.parametrize("routing", ["token", "block"])
    def test_text_has_no_part_in_the_choice(self, routing, select, scope):
        q, k = random_qk(RAGGED)
        method = method_of("3d", routing=routing, select=select, scope=scope)
        before = pairs_of(method.plan_for(q, k, video=RAGGED))
        q[:, :, -3:], k[:, :, -3:] = 1e4, -1e4
        assert torch.equal(pairs_of(method.plan_for(q, k, video=RAGGED)), before)

    @pytest.mark.parametrize(("select", "scope"), SELECTIONS)
    @pytest.mark.parametrize("routing", ["token", "block"])
    def test_samples_do_not_share_a_scope(self, routing, select, scope):
        q, k = random_qk(RAGGED, batch=3)
        q[1] *= 50
        method = method_of("3d", routing=routing, select=select, scope=scope)
        together = pairs_of(method.plan_for(q, k, video=RAGGED))
        for i in range(3):
            alone = pairs_of(method.plan_for(q[i : i + 1], k[i : i + 1], video=RAGGED))
            assert torch.equal(alone, together[i : i + 1])


class TestLeastTaken:
    """The search for the least key that is still taken, by sorting and by counting in bins."""

    @pytest.fixture(params=["sorted", "in bins"])
    def way(self, request, monkeypatch):
        monkeypatch.setattr(picking, "SORTED", 1 << 16 if request.param == "sorted" else 0)

    @pytest.mark.parametrize("seed", range(12))
    def test_it_equals_the_loops(self, way, seed):
        """Small keys with ties, or all of int32 with keys that share their upper half."""
        g = torch.Generator().manual_seed(seed)
        reach = (3, 1 << 17, (1 << 31) - 1)[seed % 3]
        keys = torch.randint(-reach, reach, (4, 40), generator=g).int()
        mass = torch.randint(0, 4, (4, 40), generator=g)
        total = mass.sum(-1)
        need = (total * torch.tensor([0.1, 0.5, 1.0, 0.9])).long().clamp_min(1)
        cut = picking.least_taken(keys, mass, total - need)
        for row in range(4):
            held, last = 0, None
            entries = zip(keys[row].tolist(), mass[row].tolist(), strict=True)
            for key, amount in sorted(entries, reverse=True):
                held, last = held + amount, key
                if held >= need[row]:
                    break
            assert cut[row].item() == last

    @pytest.mark.parametrize("least", [-(2**31), 0])
    def test_keys_may_begin_anywhere(self, way, least):
        keys = torch.tensor([[least, least + 70_000, 2**31 - 1, least + 70_000]]).int()
        mass = torch.tensor([[5, 1, 1, 1]])
        for slack, wanted in ((0, 0), (4, 0), (5, 1), (6, 1), (7, 2)):
            cut = picking.least_taken(keys, mass, torch.tensor([slack]), least)
            assert cut.item() == keys[0, wanted]

    def test_where_all_together_are_too_little_none_is_taken(self, way):
        keys = torch.tensor([[5, -(2**31) + 1, 2**31 - 1]], dtype=torch.int32)
        mass = torch.ones(1, 3, dtype=torch.int64)
        assert not (keys >= picking.least_taken(keys, mass, torch.tensor([3]))).any()
        assert (keys >= picking.least_taken(keys, 0 * mass + 2, torch.tensor([1]))).all()

    def test_keys_are_in_the_order_of_the_floats(self):
        x = torch.tensor([-torch.inf, -3e38, -1.0, -1e-40, 0.0, 1e-40, 1e-3, 7.0, torch.inf])
        keys = picking.ordered(x)
        assert keys.dtype == torch.int32
        assert (keys[1:] > keys[:-1]).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"partition": "4d"}, r"partition must be one of .*'cycle'.*, got '4d'"),
        ({"select": "best"}, r"select must be one of .*, got 'best'"),
        ({"scope": "head"}, r"scope must be one of .*, got 'head'"),
        ({"routing": "tile"}, r"routing must be one of .*'auto'.*, got 'tile'"),
        ({"chunk_1d": 0}, r"chunk_1d must be at least 1, got 0"),
        ({"chunk_2d": (3,)}, r"chunk_2d .* must be int,int or none, got \(3,\)"),
        ({"chunk_3d": (1, 2, -1)}, r"chunk_3d must be at least 1, got \(1, 2, -1\)"),
        ({"chunks": (8, 48)}, r"chunks .* must be int,int,int, got \(8, 48\)"),
        ({"topk": (0, 1, 1)}, r"topk must be at least 1, got \(0, 1, 1\)"),
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\], got 0\.0"),
        ({"threshold": 1.01}, r"threshold must be in \(0, 1\]"),
        ({"threshold": float("nan")}, r"threshold must be in \(0, 1\], got nan"),
        ({"select": "topk", "scope": "block"}, r"'block' is for select='threshold' alone"),
        ({"block": 0}, r"block must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        BlockMixture(**options)


class TestDevices:
    """What "auto" and None stand for is the device's, and the file's once it has been settled."""

    def test_gpus_route_blocks_of_their_tiles(self):
        cuda, cpu = (BlockMixture().for_device(torch.device(name)) for name in ("cuda", "cpu"))
        assert (cuda.routing, cuda.block) == ("block", 128)
        assert (cpu.routing, cpu.block) == ("token", 64)
        given = BlockMixture(routing="token", block=32)
        assert given.for_device(torch.device("cuda")) == given

    @pytest.mark.parametrize("routing", ["auto", "token", "block"])
    def test_a_call_runs_what_its_device_says(self, routing):
        q, k = random_qk(RAGGED)
        plan = method_of("3d", routing=routing).plan_for(q, k, video=RAGGED)
        assert (plan.partial is None) == (routing == "block")

    def test_summary_names_the_routing_that_ran(self):
        model = transformer()
        with attach(model, ATTACHED) as handle:
            before = str(handle.summary())
            forward(model)
        assert "routing" not in before  # its default, "auto"
        assert "routing='token'" in str(handle.summary())
        assert "routing='auto'" in repr(handle)

    def test_a_recipe_holds_what_ran(self):
        """So that a LoRA means the same on a CPU as on the GPU that it was trained on."""
        trained = BlockMixture().for_device(torch.device("cuda"))
        options = saved_options(trained)
        assert (options["routing"], options["block"]) == ("block", 128)
        again = method_of_file("block_mixture", options)
        assert again == trained
        assert all(again.for_device(torch.device(name)) == trained for name in ("cpu", "cuda"))


class TestAttached:
    @pytest.mark.slow
    def test_layers_take_the_partitions_in_turn(self):
        model = transformer(num_layers=4)
        outs = []
        for layer, partition in enumerate(("1d", "2d", "3d", "1d")):
            others = Schedule(dense_layers=tuple({0, 1, 2, 3} - {layer}))
            one = BlockMixture(**(vars(ATTACHED) | {"partition": partition}))
            with attach(model, ATTACHED, schedule=others):
                outs.append(forward(model))
            with attach(model, one, schedule=others):
                assert torch.equal(forward(model), outs[-1])
        stock = forward(model)
        assert all(not torch.allclose(out, stock, atol=1e-3) for out in outs)

    def test_what_ran_is_counted(self):
        model = transformer()
        with attach(model, ATTACHED) as handle:
            forward(model)
        summary = handle.summary()
        assert 0 < summary.density < 1
        assert summary.density <= summary.flops_share <= 1
        assert summary.to_dict()["kernels"][0].startswith("routed")

    def test_detach_leaves_the_model_as_it_was(self):
        pipe = pipeline()
        stock, original = generate(pipe), processors(pipe)
        before = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
        with attach(pipe, ATTACHED):
            assert not torch.allclose(generate(pipe), stock, atol=1e-3)
        after = pipe.transformer.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all(a is b for a, b in zip(processors(pipe), original, strict=True))
        assert torch.equal(generate(pipe), stock)

    def test_training_after_sampling(self):
        """What was laid out in inference mode serves a backward pass."""
        PLAN_CACHE.forget()
        model = transformer()
        with attach(model, ATTACHED):
            with torch.inference_mode():
                out = forward(model)
            grads = gradients(model)
            assert torch.equal(forward(model), out)
        assert all(torch.isfinite(grad).all() for grad in grads.values())

    def test_gradient_checkpointing(self):
        model = transformer()
        with attach(model, ATTACHED):
            plain = gradients(model)
            model.enable_gradient_checkpointing()
            again = gradients(model)
        assert plain.keys() == again.keys()
        assert all((again[name] - plain[name]).abs().max() < 1e-6 for name in plain)

    @pytest.mark.turns(3)
    @pytest.mark.parametrize(
        ("layers", "options"),
        [
            pytest.param(1, {"partition": "3d"}, marks=pytest.mark.nightly),
            (3, {}),
            (1, {"partition": "3d", "routing": "block"}),
            pytest.param(
                1,
                {"partition": "2d", "select": "topk", "scope": "query_head", "topk": (2, 3, 5)},
                marks=pytest.mark.nightly,
            ),
        ],
        ids=str,
    )
    @pytest.mark.slow
    def test_one_graph_equals_eager(self, layers, options):
        torch._dynamo.reset()
        model = transformer(num_layers=layers)
        with attach(model, BlockMixture(**(vars(ATTACHED) | options))):
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            exact, found = gradients(model), gradients(compiled)
            assert all(
                (found[f"_orig_mod.{name}"] - grad).abs().max() < 1e-6
                for name, grad in exact.items()
            )
            if layers > 1:
                size = (3, 10, 14)
                assert (forward(compiled, *size) - forward(model, *size)).abs().max() < 1e-6
        torch._dynamo.reset()

    def test_a_copy_has_an_attachment_of_its_own(self):
        pipe = pipeline()
        handle = attach(pipe, ATTACHED)
        expected = generate(pipe)
        twin = copy.deepcopy(pipe)
        handle.detach()
        assert torch.equal(generate(twin), expected)
        assert any(isinstance(p, SparseProcessor) for p in processors(twin))

    @pytest.mark.parametrize("select", ["threshold", "topk"])
    def test_autocast(self, select):
        """As Accelerate trains with mixed_precision="bf16"."""
        model = transformer()
        scope = "head_global" if select == "threshold" else "query_head"
        method = BlockMixture(**(vars(ATTACHED) | {"select": select, "scope": scope}))
        with attach(model, method), torch.autocast("cpu", dtype=torch.bfloat16):
            out = forward(model)
        assert torch.isfinite(out).all()

    @pytest.mark.slow
    def test_many_calls_leave_one_record_of_one_size(self):
        """Without steps to count, as in training, nothing ever clears it."""
        model = transformer()
        with attach(model, ATTACHED) as handle:
            forward(model)
            size = len(str(vars(next(iter(handle.records.values())))))
            for _ in range(20):
                forward(model)
            record = next(iter(handle.records.values()))
        assert record.calls == 21
        assert len(str(vars(record))) < size + 40
        assert 0 < record.density < 1

    @pytest.mark.parametrize("at_once", [1, 1 << 30])
    def test_heads_at_a_time_pick_the_same(self, at_once, monkeypatch):
        video = VideoShape(5, 9, 10, text=7)
        q, k = (torch.randn(2, 3, video.tokens, 16) for _ in "qk")
        for scope in ("query_head", "head_global"):
            method = BlockMixture(partition="3d", chunks=(2, 4, 8), scope=scope)
            monkeypatch.setattr(picking, "AT_ONCE", at_once)
            given = {"video": video, "kernel": "reference"}
            picks = method.plan_for(q, k, **given).partial.picks
            monkeypatch.setattr(picking, "AT_ONCE", 1 << 30)
            assert torch.equal(method.plan_for(q, k, **given).partial.picks, picks)

    def test_lists_are_tuples_and_numbers_are_refused_by_name(self):
        assert BlockMixture(chunk_2d=[4, 4], topk=[2, 10, 18]) == BlockMixture(chunk_2d=(4, 4))
        for name, wrong in (("topk", 3), ("chunks", 8), ("chunk_2d", 4), ("chunk_1d", 1.5)):
            with pytest.raises(ValueError, match=f"{name} (of BlockMixture )?must .*got {wrong}"):
                BlockMixture(**{name: wrong})
