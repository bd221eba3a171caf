"""Print what a wheel requires: `python requirements_of.py WHEEL [NAME_TO_LEAVE_OUT ...]`."""

import sys
import zipfile
from email.parser import HeaderParser

from packaging.requirements import Requirement

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = HeaderParser().parsestr(wheel.read(name).decode())
for line in metadata.get_all("Requires-Dist", []):
    requirement = Requirement(line)
    is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if is_wanted and requirement.name not in sys.argv[2:]:
        requirement.marker = None
        print(requirement)
