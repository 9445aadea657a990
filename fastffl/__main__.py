"""python -m fastffl"""

from .cli import main

main()
