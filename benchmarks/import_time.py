"""Seconds that `import glmlora` (and the names a notebook uses) takes beyond `import numpy`.

    python benchmarks/import_time.py

Medians of interleaved child processes.
"""

import statistics
import subprocess
import sys
import time

CODES = {
    "numpy": "import numpy",
    "glmlora": "import numpy, glmlora",
    "names": "import numpy; from glmlora import AutoModel, AutoTokenizer, PeftModel, train",
}


def main():
    times = {name: [] for name in CODES}
    for _ in range(15):
        for name, code in CODES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"numpy alone {medians['numpy']:.3f} s")
    print(f"import glmlora: {medians['glmlora'] - medians['numpy']:.3f} s more")
    print(f"with the names a notebook uses: {medians['names'] - medians['numpy']:.3f} s")


if __name__ == "__main__":
    main()
