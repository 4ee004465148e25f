"""Start or stop the virtual SLURM cluster.

    make slurm-up      (python -m tests.slurm.lab up)      four virtual nodes with 2 fake GPUs each, and accounting
    make slurm-down    (python -m tests.slurm.lab down)

Needs root on Debian or Ubuntu; missing packages are installed. All files are in one folder ($MVD_SLURM_LAB, default
/tmp/mvd-slurm-lab), the ports are its own, and only processes that it started are stopped.
"""

import argparse
import shutil
import sys

from tests.slurm.lab import FOLDER, Lab, can_run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("up", "down"))
    verb = parser.parse_args().verb
    if not can_run():
        print("error: the virtual SLURM cluster needs root on Debian or Ubuntu", file=sys.stderr)
        return 2
    lab = Lab(FOLDER)
    if verb == "down":
        lab.down()
        shutil.rmtree(FOLDER, ignore_errors=True)
        return 0
    FOLDER.mkdir(exist_ok=True)
    lab.up()
    print(lab.run("sinfo"), end="")
    print("\nnow, in your shell:")
    variables = ("SLURM_CONF", "MVD_SLURM_LAB", "MVD_EXPECT_GPU")
    print("\n".join(f"  export {name}={lab.environment[name]}" for name in variables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
