"""From files to arrays: reading recordings, filtering them, finding R peaks, and the files in data/.

Everything here is numpy alone. Data sets (PTB-XL, LUDB) are read here and nowhere else.
"""
