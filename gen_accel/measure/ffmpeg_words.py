"""Pick the line that tells why from ffmpeg's messages after a failure."""

import re

# Messages that ffmpeg prints in any case, and text that imageio_ffmpeg puts around them.
_ALWAYS = re.compile(
    r"\s|ffmpeg version|built with|configuration:|lib\w+ +\d|Input #|Output #|Stream mapping|"
    r"Press \[q\]|At least one output file|frame=|Last message repeated|Conversion failed|"
    r"=== stderr|Could not (load meta|read frame|get number)|FFMPEG|Error (opening|while) "
)
_SPEAKER = re.compile(r"^(\[[^]]*\] *)+")  # "[mov,mp4 @ 0x55d0] "


def why(said: object) -> str:
    """Return the last line of `said` about the file, without the speaker and the file's name."""
    lines = [line.rstrip() for line in str(said).splitlines() if line.strip()]
    telling = [line for line in lines if not _ALWAYS.match(line)]
    line = (telling or lines or ["ffmpeg does not say why"])[-1]
    return re.sub(r"^(Error opening input )?file:\S*: ", "", _SPEAKER.sub("", line)).strip()
