"""The numbers of a report in a line a task, in the order of its columns: python summary.py REPORT.json"""

import json
import sys

report = json.load(open(sys.argv[1]))
for task, found in report["results"].items():
    rows = []
    for name, row in found["metrics"].items():
        values = "/".join("-" if m["value"] is None else f"{m['value']:.4g}" for m in row.values())
        rows.append(f"{name.replace(' tokens', '').replace(' ago', '')} {values}")
    print(f"{list(report['models'])[1]}: {task}: {'; '.join(rows)}")
