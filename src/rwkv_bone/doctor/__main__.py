"""python -m rwkv_bone.doctor"""

import sys

from rwkv_bone.commands import doctor

if __name__ == "__main__":
    sys.exit(doctor("sh scripts/doctor.sh"))
