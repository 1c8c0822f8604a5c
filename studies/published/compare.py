"""The published runs, compared with the mean of the seven baselines.

    python -m studies.published.compare

As study.py does it, but by the mixed model of studies/noise: some of the seven share the seed of
their initial weights, others that of their loop, so they are not independent.
"""

from nanolab.common import run_script
from nanolab.study import tables
from nanolab.study.runs import group_by_experiment, read_file
from studies.noise.mixed_model import difference


def main():
    experiments = group_by_experiment(read_file("studies/published/results.json"))
    rows = tables.compare(experiments, "baseline", test=difference)
    print(tables.format_heading(rows, "baseline", "test_loss"), "",
          tables.format_table(tables.comparison_cells(rows, all_columns=True), markdown=True), "",
          tables.format_notes(rows, "baseline", independent=False), sep="\n")


if __name__ == "__main__":
    run_script(main)
