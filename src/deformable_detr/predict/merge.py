"""Merge the detections of an image's tiles and of the whole image: one for each object.

A view is a tile, or the whole image. What one view detects are different objects; only detections of different views,
with the same class, are compared. The best ones stay, in this order:

1. Objects that a tile shows whole, and those that only the whole image shows whole; except clusters of the former.
2. Objects that the whole image shows whole and a tile too, in more pixels.
3. Pieces: they touch an edge of their tile inside the image. Pieces of an object that no view shows whole are joined.
"""

from collections.abc import Sequence

import numpy as np

from ..utils.tiles import Window

OVERLAP = 0.5  # of the smaller area, from which on two boxes are of one object
SAME_IOU = OVERLAP / (2 - OVERLAP)  # that of equally large boxes with this overlap
MARGIN = 0.01  # of a tile's side, up to which a box touches an edge
SLACK = 0.0025  # of a view's side, by which a box may be wrong: two pixels of an input of 800
MIN_SCORE_RATIO = 0.1  # a much less certain detection, as a low threshold returns, replaces none

Group = list[int]


def merge_views(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, views: np.ndarray, windows: Sequence[Window]
) -> list[Group]:
    """Return the detections that stay, best first: each as its index, or those of the pieces that make up an object.

    Args:
        boxes: (N, 4) x1, y1, x2, y2 in pixels of the image, clipped to their windows.
        scores: (N,)
        labels: (N,)
        views: (N,) index of each detection's window.
        windows: The tiles, and the whole image as the last one.
    """
    frames = np.array([window.box for window in windows], dtype=np.float64).reshape(-1, 4)
    boxes = boxes.astype(np.float64)
    ranks = _ranks(boxes, views, frames)
    order = np.lexsort((np.arange(len(scores)), -scores, ranks))
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    better, worse = _neighbors(boxes, labels, views, frames, position)
    pieces = (ranks[better] == 2) & (ranks[worse] == 2)
    gone = _replaces(boxes, ranks, _slack(views, frames), better, worse)
    gone &= ~pieces & (scores[better] >= MIN_SCORE_RATIO * scores[worse])
    dropped = _suppress(better[gone], worse[gone], position)
    dropped[_clusters(boxes, scores, views, frames, better, worse, np.where(dropped, -1, ranks))] = True

    joinable = pieces & ~dropped[better] & ~dropped[worse]
    joinable[joinable] = _agree(boxes, views, frames, better[joinable], worse[joinable])
    groups = _join(order[~dropped[order]], views, better[joinable], worse[joinable])
    return sorted(groups, key=lambda group: -scores[group[0]])


def _ranks(boxes: np.ndarray, views: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Return 0, 1 or 2 for each detection, as the module describes."""
    whole, margins = frames[-1], MARGIN * (frames[:, 2:] - frames[:, :2])
    # Where a box must end in order not to touch an edge inside the image.
    first = np.where(frames[:, :2] > whole[:2], frames[:, :2] + margins, -np.inf)
    last = np.where(frames[:, 2:] < whole[2:], frames[:, 2:] - margins, np.inf)
    cut = (boxes[:, :2] < first[views]).any(1) | (boxes[:, 2:] > last[views]).any(1)
    ranks = np.where(cut, 2, 0)
    for index in np.flatnonzero(views == len(frames) - 1):
        inside = (boxes[index, :2] >= first[:-1]) & (boxes[index, 2:] <= last[:-1])
        ranks[index] = int(inside.all(1).any())
    return ranks


def _slack(views: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Return by how many pixels the box of each detection can be wrong."""
    return SLACK * (frames[views, 2:] - frames[views, :2]).max(1)


def _neighbors(
    boxes: np.ndarray, labels: np.ndarray, views: np.ndarray, frames: np.ndarray, position: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of boxes of one class in different views that overlap or nearly touch, the better one first."""
    members = np.split(np.argsort(views, kind="stable"), np.cumsum(np.bincount(views, minlength=len(frames)))[:-1])
    used = np.array([view for view, indices in enumerate(members) if len(indices)], dtype=np.int64)
    grown = _grow(boxes, _slack(views, frames))
    pairs = [np.zeros((2, 0), dtype=np.int64)]
    for number, view in enumerate(used):
        others = used[number + 1 :]
        others = others[_shared_area(frames[view], frames[others]) > 0]
        if len(others):
            first, second = members[view], np.concatenate([members[other] for other in others])
            touching = _shared_area(grown[first][:, None], grown[second]) > 0
            i, j = np.nonzero(touching & (labels[first][:, None] == labels[second]))
            pairs.append(np.stack([first[i], second[j]]))
    i, j = np.concatenate(pairs, axis=1)
    swapped = position[i] > position[j]
    return np.where(swapped, j, i), np.where(swapped, i, j)


def _replaces(
    boxes: np.ndarray, ranks: np.ndarray, slack: np.ndarray, better: np.ndarray, worse: np.ndarray
) -> np.ndarray:
    """Return which pairs are of one object, the worse of which may be a piece or blurred."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    total, small = areas[better] + areas[worse], np.minimum(areas[better], areas[worse])
    shared = _shared_area(boxes[better], boxes[worse])
    covered = _shared_area(_grow(boxes[better], slack[worse]), boxes[worse])
    same = shared >= SAME_IOU * (total - shared)
    # A piece can contain a small object, which does not replace it.
    return np.choose(ranks[worse], [same, covered >= OVERLAP * small, covered >= OVERLAP * areas[worse]])


def _clusters(
    boxes: np.ndarray,
    scores: np.ndarray,
    views: np.ndarray,
    frames: np.ndarray,
    better: np.ndarray,
    worse: np.ndarray,
    ranks: np.ndarray,
) -> np.ndarray:
    """Return the detections of the whole image that are several small objects: tiles show these, and no piece of it."""
    whole = len(frames) - 1
    pairs = np.concatenate([np.stack([better, worse]), np.stack([worse, better])], axis=1)
    large, other = pairs[:, (views[pairs[0]] == whole) & (ranks[pairs[0]] == 0)]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    inside = _shared_area(boxes[large], boxes[other]) >= OVERLAP * areas[other]
    inside &= (ranks[other] == 0) & (scores[other] >= OVERLAP * scores[large])
    seen = _agree(boxes, views, frames, large, other)
    several, shown = (np.bincount(large[pairs], minlength=len(boxes)) for pairs in (inside, seen))
    return np.flatnonzero((several > 1) & (shown == 0))


def _grow(boxes: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    return boxes + pixels[:, None] * np.array([-1, -1, 1, 1])


def _shared_area(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return sides.clip(min=0).prod(-1)


def _suppress(better: np.ndarray, worse: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return which detections (N,) a better one replaces, from the best on; a replaced one replaces none."""
    dropped = np.zeros(len(position), dtype=bool)
    for i in np.argsort(position[better], kind="stable"):
        if not dropped[better[i]]:
            dropped[worse[i]] = True
    return dropped


def _agree(boxes: np.ndarray, views: np.ndarray, frames: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return which pairs of pieces look the same in the part of the image that both of their tiles show."""
    low = np.maximum(frames[views[a], :2], frames[views[b], :2])
    high = np.minimum(frames[views[a], 2:], frames[views[b], 2:])
    seen = [np.concatenate([boxes[i, :2].clip(low, high), boxes[i, 2:].clip(low, high)], axis=1) for i in (a, b)]
    shared = _shared_area(*seen)
    areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in seen]
    return shared >= SAME_IOU * (sum(areas) - shared)


def _join(kept: np.ndarray, views: np.ndarray, a: np.ndarray, b: np.ndarray) -> list[Group]:
    """Return groups of pieces that agree with a neighbor, at most one piece per view; others of a view are dropped."""
    neighbors: dict[int, list[int]] = {}
    for first, second in zip(a.tolist(), b.tolist(), strict=True):
        neighbors.setdefault(first, []).append(second)
        neighbors.setdefault(second, []).append(first)
    rank = {index: number for number, index in enumerate(kept.tolist())}
    done: set[int] = set()
    groups: list[Group] = []
    for seed in kept.tolist():
        if seed in done:
            continue
        group, used = [seed], {int(views[seed])}
        for member in group:  # grows
            for other in sorted(neighbors.get(member, ()), key=rank.__getitem__):
                if other not in done and int(views[other]) not in used:
                    group.append(other)
                    used.add(int(views[other]))
                    done.add(other)
                elif other not in group:
                    done.add(other)
        groups.append(group)
    return groups
