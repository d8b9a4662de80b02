"""The speed of a device that exists on paper."""

from utils.plan.arithmetic import Pace


def pace(seconds: float, peak_bytes: float = 0, update: float = 0.0) -> Pace:
    return Pace({"forward + backward": seconds, "optimizer": update}, int(peak_bytes))
