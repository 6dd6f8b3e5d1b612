"""ffmpeg as a program, for what its libraries in PyAV are built without, such as VMAF."""

from gen_accel.extras import needed_for


def ffmpeg_binary() -> str:
    """Path of the ffmpeg of imageio-ffmpeg, or of the one that IMAGEIO_FFMPEG_EXE names.

    Raises:
        ModuleNotFoundError: imageio_ffmpeg is not installed; with the command that installs it.
        OSError: it has no ffmpeg for this machine.
    """
    with needed_for("the program ffmpeg", extra="quality"):
        import imageio_ffmpeg
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise OSError(f"imageio_ffmpeg has no ffmpeg for this machine: {error}") from error
