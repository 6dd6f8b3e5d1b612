"""Configs of a training: YAML and flags, what is refused, commands and dry runs."""

import re
import shutil

import pytest
import yaml
from support.runs import (
    WEIGHTS,
)

from gen_accel.lora import TrainConfig, print_config, read_config, trainer
from gen_accel.lora.config import Stage

pytestmark = pytest.mark.usefixtures("one_thread")

NESTED = "lora.yaml is nested too deep: it may have at most 64 levels"
ITSELF = r"lora\.yaml, line 1, has \*a within itself: write the values"


def written(tmp_path, text):
    path = tmp_path / "lora.yaml"
    path.write_text(text)
    return path


class TestConfig:
    def test_numbers_as_yaml_reads_them(self, tmp_path):
        path = written(
            tmp_path,
            "learning_rate: 1e-4\nrank: 16.0\nalpha: none\nfps: 24\nmixed_precision: no\n"
            "betas: [0, 1e-1]\nstages: 9:100\nmax_tokens:\nseed: '7'\n",
        )
        given = read_config(path)
        assert given.learning_rate == 1e-4
        assert (given.rank, given.alpha, given.fps) == (16, None, 24.0)
        assert type(given.rank) is int
        assert type(given.fps) is float
        assert given.mixed_precision == "no"
        assert given.betas == (0.0, 0.1)
        assert given.stages == ("9:100",)
        assert (given.max_tokens, given.seed) == (None, 7)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("learning_rat: 1", "unknown field 'learning_rat', did you mean 'learning_rate'?"),
            ("zzz: 1", "unknown field 'zzz'$"),
            ("3: 1", "unknown field 3$"),
            ("rank: many", "rank must be int, got 'many'"),
            ("rank: 1.5", "rank must be int, got 1.5"),
            ("rank: true", "rank must be int, got True"),
            ("rank: .inf", "rank must be int, got inf"),
            ("rank: [1]", "rank must be int, got"),
            ("learning_rate: true", "learning_rate must be float, got True"),
            (
                "gradient_checkpointing: 1",
                "gradient_checkpointing must be one of off, on, offload, got 1",
            ),
            ("betas: [0.9]", r"betas must be float,float, .*; such as betas: \[0\.9, 0\.99\]$"),
            (
                "objective: flows",
                "objective must be one of flow, distill, distill_attention, causal, got 'flows'",
            ),
            ("mixed_precision: yes", "mixed_precision must be one of no, bf16, fp16, got True"),
            ("data: {a: b}", "data must be str or none, got"),
            ("stages: [81:20]", "in quotes in YAML"),
            ("- rank", "must hold fields as `name: value`, got"),
            ("rank", "must hold fields as `name: value`, got 'rank'"),
            ("", "must hold fields as `name: value`, got None"),
            ("rank: [", "is not YAML"),
            pytest.param(f"rank: {'[' * 500}{']' * 500}", NESTED, id="lists"),
            pytest.param(f"rank: {'{a: ' * 1000}1{'}' * 1000}", NESTED, id="mappings"),
            ("rank: &a [*a]", ITSELF),
            ("targets: &a [*a]", ITSELF),
            ("&a {rank: *a}", ITSELF),
            (
                "switch_every: 2",
                "switch_every is gone: part both trains one expert after",
            ),
            ("both_dropout: 0.1", "both_dropout is gone: image_dropout and caption_dropout are"),
            ("preset: style", "preset is gone: configs/lora has a file for each purpose"),
            ("workers: -1", "workers must be from 0 to 256, got -1"),
            ("workers: 1000", "workers must be from 0 to 256, got 1000"),
        ],
        ids=str,
    )
    def test_what_is_refused(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            read_config(written(tmp_path, text))

    def test_not_text_and_not_there(self, tmp_path):
        (tmp_path / "lora.yaml").write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(ValueError, match=r"lora\.yaml is not UTF-8 text, from byte 0"):
            read_config(tmp_path / "lora.yaml")
        with pytest.raises(FileNotFoundError):
            read_config(tmp_path / "other.yaml")

    def test_flags_take_the_place_of_the_file(self, tmp_path):
        given = read_config(written(tmp_path, "rank: 8\nseed: 3"), {"rank": "4"})
        assert (given.rank, given.seed) == (4, 3)

    @pytest.mark.parametrize(
        "given",
        [
            TrainConfig(),
            TrainConfig(
                data='a "b": #c',
                out="x " * 150,
                fps=None,
                stages=("81:20", "161:5:position_interpolation"),
                method="sparse_linear",
                settings=("critical=0.1",),
                rank=0,
                alpha=1e-7,
                mixed_precision="no",
                validate_every=3,
                validation_prompts=("a: cat, - 'surfs'", "word " * 90, "größer"),
                validation_frames=9,
            ),
        ],
        ids=["default", "awkward"],
    )
    def test_what_is_printed_is_read_again(self, tmp_path, given):
        text = print_config(given)
        assert read_config(written(tmp_path, text)) == given
        assert list(yaml.safe_load(text)) == [*TrainConfig.options()]
        assert all(one.help in text for one in TrainConfig.options().values())

    def test_lists_are_tuples(self):
        assert TrainConfig(stages=["9:1"]) == TrainConfig(stages=("9:1",))

    def test_stages(self):
        given = TrainConfig(stages=("81:20", "161:600:riflex"))
        assert given.curriculum == (Stage(81, 20), Stage(161, 600, "riflex"))
        assert [str(stage) for stage in given.curriculum] == list(given.stages)
        assert (given.total_steps, given.longest) == (620, 161)


class TestCommands:
    @pytest.mark.parametrize("verb", ["train", "cache"])
    def test_every_field_is_a_flag(self, run, verb):
        text = run(verb, "--help").stdout
        for one in TrainConfig.options().values():
            assert re.search(rf"--{one.name.replace('_', '-')}\b", text), one.name

    def test_print_config(self, run, tmp_path):
        text = run("train", "--print-config", "--rank", "3", "--stages", "9:1,17:2").stdout
        path = written(tmp_path, text)
        assert read_config(path) == TrainConfig(rank=3, stages=("9:1", "17:2"))
        flags = ("--betas", "0.5,0.6", "--no-train-processors", "--alpha", "none")
        text = run("train", path, "--print-config", *flags).stdout
        assert read_config(written(tmp_path, text)) == TrainConfig(
            rank=3, stages=("9:1", "17:2"), betas=(0.5, 0.6), train_processors=False
        )

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--rank", "x"), "rank must be int, got 'x'; such as --rank 128"),
            (("--betas", "0.9,x"), "got '0.9,x'; such as --betas 0.9,0.99"),
            (("nowhere.yaml",), "nowhere.yaml"),
            (("--dry-run", "--resume"), "leave --resume out"),
            (("--data", "nowhere"), "data: there is nothing at nowhere"),
        ],
        ids=str,
    )
    def test_one_line_for_what_is_wrong(self, run, tmp_path, args, message):
        result = run("train", "--out", tmp_path / "run", *args, code=2)
        assert re.fullmatch(r"error: .*\n?", result.stderr)
        assert message in result.stderr

    @pytest.mark.slow
    def test_cache_train_and_resume(self, run, on_disk, tmp_path):
        path = written(tmp_path, print_config(on_disk(stages=("9:1",))))
        first = run("cache", path)
        assert "3 clips encoded" in first.stdout
        assert "warning: the autoencoder gives 3 clips back at" in first.stdout + first.stderr
        assert "3 kept" in run("cache", path).stdout
        done = run("train", path)
        assert re.match(rf"1 steps, \d+ s: {re.escape(str(tmp_path))}/run/lora", done.stdout)
        assert "3 kept" in done.stderr
        assert "holds a run" in run("train", path, code=2).stderr
        shutil.rmtree(tmp_path / "run" / "lora")
        run("train", path, "--resume")
        assert (tmp_path / "run" / "lora" / WEIGHTS).exists()

    def test_cache_needs_data(self, run, tmp_path):
        assert "data is not given" in run("cache", "--out", tmp_path, code=2).stderr

    def test_dry_run(self, run, on_disk, tmp_path):
        path = written(tmp_path, print_config(on_disk(data="nowhere")))
        said = run("train", path, "--dry-run").stdout
        assert re.match(r"2 steps on a tiny model, losses [\d.]+, [\d.]+\n", said)
        assert "not looked at: memory and time (--plan)" in said
        assert not (tmp_path / "run").exists()

    def test_an_interruption(self, run, tmp_path, monkeypatch):
        stopped = trainer.Trained(None, 3, [], 1.0)
        monkeypatch.setattr(trainer, "train", lambda *args, **kwargs: stopped)
        (tmp_path / "cache").mkdir()
        result = run("train", "--out", tmp_path, code=130)
        assert "stopped after step 3; --resume goes on" in result.stderr


def test_the_embedded_model_trains_at_its_own_size_unless_told():
    def told(**given):
        config = TrainConfig(**given)
        return config.height, config.width, config.stages, config.mixed_precision

    assert told() == told(model="demo") == (96, 96, ("33:200",), "no")
    assert told(model="a/model") == (480, 832, ("81:200", "161:600"), "bf16")
    # What is said counts, also where it is the default of other models.
    assert told(height=480, width=832, mixed_precision="bf16") == (480, 832, ("33:200",), "bf16")
    assert told(sizes=("64x96", "96x64"))[:2] == (64, 96)
    again = TrainConfig.read(yaml.safe_load(TrainConfig(height=480).as_yaml()))
    assert (again.height, again.width) == (480, 96)
