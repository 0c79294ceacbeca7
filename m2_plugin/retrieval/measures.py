"""Measure rankings with `ir-measures`, which computes these measures with trec_eval's code.

trec_eval orders hits by score, and equal scores by document id, from the last to the first. A query
without hits scores 0.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["DEFAULT", "parse", "score"]

NAME = re.compile(r"[A-Za-z]+(@[1-9][0-9]*)?")  # @0 would end the process in trec_eval's code
DEFAULT = ("nDCG@10", "R@10", "R@100", "AP", "RR")


def parse(names: Sequence[str]) -> list[Any]:
    """Return the measures of `ir-measures` with these names.

    Raises:
        ValueError: If one is unknown or cannot be computed, or the package is not installed.
    """
    library = _library()
    measures = []
    for name in names:
        try:
            if not NAME.fullmatch(name):
                raise ValueError("a name, or a name, @ and a number above 0")
            measure = library.parse_measure(name)
            library.calc_aggregate([measure], {"q": {"d": 1}}, {"q": {"d": 1.0}})  # a trial
        except Exception as error:  # the package raises errors of many types
            reason = " ".join(str(error).split())
            raise ValueError(
                f"--measures: {name!r} is not one of ir-measures, such as {' '.join(DEFAULT)}: "
                f"{reason}"
            ) from error
        measures.append(measure)
    return measures


def score(
    measures: Iterable[Any], qrels: Mapping[str, Any], run: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Score some queries.

    Args:
        measures: From `parse`.
        qrels: Query → document → grade. A grade of 1 and more is relevant; nDCG's gain is the
            grade.
        run: Query → document → score, for the same queries.

    Returns:
        Query → name of the measure → value.
    """
    measures = list(measures)
    found = {query: dict.fromkeys(map(str, measures), 0.0) for query in qrels}
    for metric in _library().iter_calc(measures, qrels, run):
        found[metric.query_id][str(metric.measure)] = float(metric.value)
    return found


def _library() -> Any:
    try:
        import ir_measures
    except ImportError as error:
        raise ValueError(
            f"retrieval needs ir-measures: pip install 'm2-plugin[retrieval]' ({error})"
        ) from error
    return ir_measures
