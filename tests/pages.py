"""What the tests of pages in a browser share."""

import io
import re
import subprocess
import time
from contextlib import contextmanager

import numpy as np
from PIL import Image

SECONDS = 120  # that a page, or a server, may take on a machine that is busy with other things


def wait_until(holds):
    """Until a condition holds, of what no page can wait for."""
    end = time.monotonic() + SECONDS
    while not (result := holds()):
        assert time.monotonic() < end, f"not within {SECONDS} seconds: {holds}"
        time.sleep(0.05)
    return result


@contextmanager
def served(command, address, log):
    """A server that runs meanwhile; what it tells of its address, which it writes to the file `log`."""
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:

            def found():
                assert process.poll() is None, log.read_text()
                return re.search(address, log.read_text())

            yield wait_until(found)[0]
        finally:
            process.terminate()


def is_drawn(chart):
    """Whether there is color in a chart, be it a slate blue: axes and grid are gray."""
    pixels = np.asarray(Image.open(io.BytesIO(chart.screenshot())).convert("RGB")).astype(int)
    return (np.ptp(pixels, axis=-1) > 25).sum() > 20
