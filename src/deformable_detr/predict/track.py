"""Tracks: an object keeps its id from frame to frame. The tracker is ByteTrack of the package `trackers`."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch

from ..structures import Detections
from ..utils.errors import UserError
from ..utils.packages import need

LOW_SCORE = 0.1  # ByteTrack continues tracks with detections under the threshold, down to this score
UNCONFIRMED = -1


class Tracker:
    """Give the detections of successive frames ids that follow the objects.

    ByteTrack starts a track at a detection of at least `threshold` and confirms it when the next frame continues it.
    Detections from 0.1 to `threshold` only continue tracks. A track that has had no detection for one second ends.
    Every class is tracked on its own: an object that changes its class gets another id. The ids of a single class are
    those of `trackers.ByteTrackTracker`; with several classes, tracks are numbered as they are confirmed.

    Args:
        threshold: Minimum score of the detections that `update` returns, 0..1.
        frame_rate: Frames per second.

    Attributes:
        min_score: Minimum score of the detections that `update` needs.
        count: Number of confirmed tracks so far.

    Raises:
        UserError: The package `trackers` is not installed, or a setting is out of range.
    """

    def __init__(self, threshold: float = 0.5, frame_rate: float | Fraction = 30.0) -> None:
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold {threshold}: must be from 0 to 1")
        if not 0 < frame_rate < math.inf:
            raise UserError(f"frame_rate {frame_rate}: must be over 0")
        self._package = need("trackers", "track")
        self.threshold, self.min_score = threshold, min(threshold, LOW_SCORE)
        self.count = 0
        self._frame_rate = float(frame_rate)
        self._seconds = -math.inf
        self._classes: dict[int, _ClassTracks] = {}  # by label, only those with tracks

    def update(self, detections: Detections, seconds: float | None = None) -> Detections:
        """Return the detections of the next frame that score at least `threshold`, with `track_ids`.

        Args:
            detections: All detections of the frame that score at least `min_score`.
            seconds: Time of the frame. Omit it in all frames if they are equally spaced.
        """
        if seconds is not None:
            self._seconds = seconds = max(seconds, self._seconds + 1e-3)  # in damaged files, times can go back
        labels = detections.labels.numpy()
        ids = np.full(len(labels), UNCONFIRMED, dtype=np.int64)
        for label in sorted({*labels.tolist(), *self._classes}):
            rows = np.flatnonzero(labels == label)
            if label not in self._classes:
                self._classes[label] = _ClassTracks(self._new_tracker(), {})
            ids[rows] = self._update_class(self._classes[label], detections, rows, seconds)
        self._classes = {label: tracks for label, tracks in self._classes.items() if tracks.tracker.tracks}
        detections = replace(detections, track_ids=torch.from_numpy(ids))
        return detections.select(detections.scores >= self.threshold)

    def _update_class(
        self, tracks: "_ClassTracks", detections: Detections, rows: np.ndarray, seconds: float | None
    ) -> np.ndarray:
        """Return the track ids (K,) of the detections (K,) of a class, which are numbered over all classes."""
        import supervision as sv

        boxes, scores = detections.boxes.numpy()[rows], detections.scores.numpy()[rows]
        one_class = sv.Detections(xyxy=boxes, confidence=scores, data={"position": np.arange(len(rows))})
        tracked = tracks.tracker.update(one_class, timestamp=seconds)
        ids = np.full(len(rows), UNCONFIRMED, dtype=np.int64)
        for own in sorted({*tracked.tracker_id.tolist()} - {UNCONFIRMED, *tracks.ids}):
            tracks.ids[own] = self.count
            self.count += 1
        if len(tracked):
            ids[tracked.data["position"]] = [tracks.ids.get(own, UNCONFIRMED) for own in tracked.tracker_id.tolist()]
        for own in tracks.ids.keys() - {track.tracker_id for track in tracks.tracker.tracks}:
            del tracks.ids[own]  # a track that has ended
        return ids

    def _new_tracker(self) -> Any:
        return self._package.ByteTrackTracker(
            frame_rate=self._frame_rate,
            track_activation_threshold=self.threshold,
            high_conf_det_threshold=self.threshold,
        )


class _ClassTracks(NamedTuple):
    """The tracks of one class."""

    tracker: Any  # trackers.ByteTrackTracker
    ids: dict[int, int]  # from the tracker's ids to those over all classes
