"""Of all that ffmpeg says when it fails, the line that tells why."""

import re

# What it says in any case, and what imageio_ffmpeg puts around it.
_ALWAYS = re.compile(
    r"\s|ffmpeg version|built with|configuration:|lib\w+ +\d|Input #|Output #|Stream mapping|"
    r"Press \[q\]|At least one output file|frame=|Last message repeated|Conversion failed|"
    r"=== stderr|Could not (load meta|read frame|get number)|FFMPEG|Error (opening|while) "
)
_SPEAKER = re.compile(r"^(\[[^]]*\] *)+")  # "[mov,mp4 @ 0x55d0] "


def why(said: object) -> str:
    """The last line of `said` that is about the file, without who says it and the name of it."""
    lines = [line.rstrip() for line in str(said).splitlines() if line.strip()]
    telling = [line for line in lines if not _ALWAYS.match(line)]
    line = (telling or lines or ["ffmpeg does not say why"])[-1]
    return re.sub(r"^(Error opening input )?file:\S*: ", "", _SPEAKER.sub("", line)).strip()
