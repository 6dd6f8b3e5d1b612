"""MiniMax-H3, video with sound from text, key frames and references.

One attention runs over one packed sequence: text, key frames or references, sound, and last the
video in raster order, all else before it. The refiner of the text, which attends over the text
alone, is left as it is.
"""

from torch import Tensor

from gen_accel.attention_processors.families.base import Attention, Family, Generation, Given
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.sites import Model, outside_graphs
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape


class MiniMaxH3(Family):
    models = "MiniMax-H3"
    order = "text, key frames or references, sound, video"
    attention = Attention(text="before", rising=True)
    generation = Generation(least_steps=2)

    def layers(self, transformer: Model) -> Layers:
        return Layers(
            {
                r"time|adaln|norm": "one",
                r"context_embedder|refiner": "text",
                r"audio_proj_in": "sound",
                r"^proj_in": "video",
            },
            {
                r"refiner_blocks.*attn\.to_q$": ("text", "text"),
            },
            beside="text + sound",
            default="video + text + sound",
            uncounted="the sound, and key frames or references",
        )

    @outside_graphs
    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid of the video, which comes after the sound, read from the positions of its
        tokens. Waits for the device."""
        start = int(given["audio_indices"].max()) + 1
        times, rows, _ = given["position_ids"][start:].unbind(1)
        in_frame = times == times[0]
        in_row = in_frame & (rows == rows[0])
        frame, width = int(in_frame.sum()), int(in_row.sum())
        grid = len(times) // frame, frame // width, width
        return Tokens(VideoShape(*grid, text=start), start)

    def timestep(self, given: Given) -> Tensor:
        """(1,), read at the last token, which is the video's. It rises from 0 to 1, for a clean
        video."""
        return given["timestep"][given["timestep_indices"][-1:]]
