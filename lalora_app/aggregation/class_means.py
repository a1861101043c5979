"""A head from class sums: each class's weights are the direction of its mean feature.

The classifier is that of the nearest class mean on the unit sphere, known as weight imprinting (Qi
et al., arXiv:1712.07136) and, with noised sums, as private prototypes (arXiv:2406.08039).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lalora_app.adapter.factors import Adapter, Array
from lalora_app.adapter.low_rank import Float64Array
from lalora_app.aggregation.average import weighted_mean
from lalora_app.aggregation.rule import Aggregated, RoundInfo

# Root mean square of the lengths of the head's rows, a constant: logits then differ between classes
# by about the size of a feature's discriminating part, whatever the noise of the sums is.
ROW_LENGTH = 1.0


def _unit_rows(rows: Float64Array) -> Float64Array:
    """Return the rows divided by their lengths; a zero row stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Float64Array = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return unit


def head_of_class_sums(sums: Mapping[str, Array]) -> Adapter:
    """Return the head whose classes are the directions of their sums.

    With s_c the sum of class c, of features with a 1 appended, and d_c = s_c/‖s_c‖, the row of
    class c is d_c minus the mean of all d. All rows are multiplied by one number, with which the
    root mean square of their lengths is ``ROW_LENGTH``. The mean has no effect on a prediction:
    the largest logit is that of the class with the smallest angle between its mean and the feature.

    Args:
        sums: the sums under the head's names: the weight (classes, features) holds the features'
            part and the bias (classes,) that of the appended 1; a head without bias has only the
            weight.

    Limits: the size of a class has no effect; a class without any example gets d_c = 0; if all
    directions are equal, the head is zero.

    Privacy: post-processing of noised sums; no extra cost.
    """
    columns = [sums[name].astype(np.float64).reshape(len(sums[name]), -1) for name in sums]
    directions = _unit_rows(np.concatenate(columns, axis=1))  # (classes, features + 1)
    rows = directions - directions.mean(axis=0)
    size = float(np.sqrt(np.mean(np.sum(rows**2, axis=1))))
    rows *= ROW_LENGTH / size if size > 0 else 0.0
    ends = np.cumsum([part.shape[1] for part in columns])[:-1]
    parts = zip(sums, np.split(rows, ends, axis=1), strict=True)
    return {name: part.reshape(sums[name].shape).astype(np.float32) for name, part in parts}


def class_means_head(
    current: Adapter, weights: Sequence[float], uploads: Sequence[Adapter], info: RoundInfo
) -> Aggregated:
    """Average the clients' class sums, and replace the head by that of the averages.

    Args:
        current: the global adapter; all but the head stays.
        weights: one positive weight per client.
        uploads: each client's noised class sums, divided by its number of examples, under the
            head's names.
        info: the round and the settings; not used.

    Privacy: post-processing of noised uploads; no extra cost.
    """
    merged = weighted_mean(current, weights, uploads)
    return Aggregated(merged | head_of_class_sums({name: merged[name] for name in uploads[0]}))
