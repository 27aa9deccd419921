# SPDX-License-Identifier: Apache-2.0
"""Runs nvcc and writes its resource report (-Xptxas -v) to OBJECT.ptxas.txt instead of stderr.

tools/kernel_report.py reads these reports without a second compilation.
Usage: nvcc_launcher.py [ccache] nvcc ARGUMENTS -o OBJECT
"""

import os
import re
import subprocess
import sys

REPORT_LINE = re.compile(r"^(ptxas info|\s+\d+ bytes stack frame)")


def main() -> int:
    command = sys.argv[1:]
    threads = os.environ.get("ADACACHE_NVCC_THREADS")  # architectures compiled in parallel per nvcc
    done = subprocess.run(
        [*command, f"--threads={threads}"] if threads else command, stderr=subprocess.PIPE, text=True
    )
    lines = done.stderr.splitlines(keepends=True)
    sys.stderr.writelines(line for line in lines if not REPORT_LINE.match(line))
    if done.returncode == 0 and "-o" in command:
        with open(command[command.index("-o") + 1] + ".ptxas.txt", "w") as report:
            report.writelines(line for line in lines if REPORT_LINE.match(line))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
