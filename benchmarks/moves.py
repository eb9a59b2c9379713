"""Open the page of layers of a finished run, move its slider, print how long each rerun took.

`python -m benchmarks.moves RUN_ID MOVES`, home in CHIPVIZ_HOME. Prints milliseconds as JSON. A
program of its own, without torch, just as the server is.
"""

import json
import logging
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def measure_moves(run_id: str, n_moves: int) -> list[float]:
    """Milliseconds of each rerun after the slider moved, the first page view not counted.

    Raises:
        SystemExit: If the page shows an error.
    """
    from streamlit.testing.v1 import AppTest

    logging.getLogger("streamlit").setLevel(logging.ERROR)
    at = AppTest.from_file(str(ROOT / "chipviz/ui/main.py"), default_timeout=60)
    at.query_params["run"] = run_id
    at.run()
    at.query_params["run"] = run_id
    at.switch_page("../../pages/layers.py").run()
    times = []
    for i in range(n_moves + 1):
        slider = next(s for s in at.slider if s.key == "cut")
        there = int(slider.min) + i % (int(slider.max) - int(slider.min) + 1)
        moved = slider.set_value(there)
        start = time.perf_counter()
        moved.run()
        times.append(1000 * (time.perf_counter() - start))
        if at.exception:
            raise SystemExit(f"the page says: {at.exception[0].value}")
    return times[1:]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_moves(sys.argv[1], int(sys.argv[2]))) + "\n")
