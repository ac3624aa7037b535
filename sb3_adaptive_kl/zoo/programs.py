"""The programs that the zoo's `record_training` calls by name: `python` for each video, and `ffmpeg` to join the videos."""

import atexit
import os
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path


def provide_programs() -> None:
    """
    Put `python` and `ffmpeg` on the PATH of this process and its children.

    :raises SystemExit: if neither the system nor imageio-ffmpeg has an ffmpeg. record_training would fail only after it has
        recorded everything.
    """
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if shutil.which("ffmpeg"):
        return
    try:
        bundled = import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        sys.exit(f"record_training joins its videos with ffmpeg, which was not found ({error}): pip install imageio-ffmpeg")
    # The bundled file has another name, such as ffmpeg-linux-x86_64-v7.0.2
    folder = tempfile.mkdtemp(prefix="ffmpeg-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, "ffmpeg").symlink_to(bundled)
    os.environ["PATH"] += os.pathsep + folder
