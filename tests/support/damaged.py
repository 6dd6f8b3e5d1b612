"""Files that are not what they are called: cut off, of another kind, or made to exhaust."""

import struct
import zlib
from pathlib import Path

from safetensors.torch import load_file, save_file

DEPTH = 3000


def write(folder: Path, home: Path) -> None:
    """All of them, from the good ones in `home`."""
    folder.mkdir()
    clip = (home / "one" / "a.mp4").read_bytes()
    tensors = (home / "l.safetensors").read_bytes()
    deep = "[" * DEPTH + "]" * DEPTH
    files: dict[str, bytes] = {
        "empty.mp4": b"",
        "half.mp4": clip[: len(clip) // 2],
        "zeros.mp4": clip[:400] + bytes(len(clip) - 400),
        "head.mp4": clip[:40],
        "empty.gif": b"",
        "text.gif": b"no picture",
        "bomb.png": _png(60000, 60000),
        "half.png": _png(8, 8)[:40],
        "empty.safetensors": b"",
        "half.safetensors": tensors[: len(tensors) // 2],
        "header.safetensors": struct.pack("<Q", 2**62) + b"{}",
        "text.safetensors": b"no tensors",
        "latin.txt": "caf\xe9".encode("latin-1"),
        "blank.txt": b"\n \n",
        "separators.txt": "a\u2028b\x0cc\x85d\n".encode(),
        "windows.txt": "\ufeffa\r\nb\r\n".encode(),
        "deep.yaml": deep.encode(),
        "alias.yaml": _aliases(),
        "tag.yaml": b"!!python/object/apply:os.getpid []\n",
        "list.yaml": b"- a\n- b\n",
        "latin.yaml": "model: caf\xe9\n".encode("latin-1"),
        "colon.yaml": b"model: a: b\n",
        "twice.yaml": b"rank: 1\nrank: 2\n",
        "deep.jsonl": (deep + "\n").encode(),
        "number.jsonl": b"3\n",
        "none.jsonl": b'{"video": null, "caption": null}\n',
        "outside.jsonl": b'{"video": "../../etc/passwd", "caption": "a"}\n',
        "user.jsonl": b'{"video": "~nosuchuser/a.mp4", "caption": "a"}\n',
        "half.jsonl": b'{"video": "a.mp4", "cap',
        "long.csv": b"video,caption\na.mp4," + b"x" * 200_000 + b"\n",
        "columns.csv": b"film,words\na.mp4,b\n",
        "nul.csv": b"video,caption\na\x00.mp4,b\n",
        "playlist.mp4": b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
        "concat.mp4": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "weights.bin": b"\x80\x04cos\nsystem\n.",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name, about in {
        "list": "[]",
        "deep": deep,
        "no": "{",
        "rate": '{"fps": "x"}',
        "huge": '{"fps": 1e400}',
    }.items():
        metadata = {"gen_accel": about}
        save_file(
            load_file(home / "l.safetensors"), folder / f"{name}.safetensors", metadata=metadata
        )
    _models(folder, home)


def _models(folder: Path, home: Path) -> None:
    """Folders of pipelines whose index is damaged; the rest is the good one's."""
    indices = {
        "no_index": None,
        "deep_index": "[" * DEPTH + "]" * DEPTH,
        "list_index": "[]",
        "number_class": '{"_class_name": 3}',
        "no_class": "{}",
        "other_class": '{"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]}',
        "other_library": '{"_class_name": "WanPipeline", "transformer": ["os", "path"]}',
        "text_part": '{"_class_name": "WanPipeline", "transformer": "x"}',
    }
    for name, text in indices.items():
        (folder / name).mkdir()
        for part in (home / "model").iterdir():
            if part.is_dir():
                (folder / name / part.name).symlink_to(part)
        if text is not None:
            (folder / name / "model_index.json").write_text(text)


def _png(width: int, height: int) -> bytes:
    """A head that tells of these sizes, and next to no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 10)), (b"IEND", b""))
    made = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        made += struct.pack(">I", len(data)) + kind + data
        made += struct.pack(">I", zlib.crc32(kind + data))
    return made


def _aliases() -> bytes:
    """Nine lists of nine of the one before."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    for i in range(1, 9):
        lines.append(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]")
    return "\n".join(lines).encode()
