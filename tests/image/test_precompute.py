"""Rows on their way to the encoder."""

import time
from concurrent.futures import ThreadPoolExecutor

from utils.image.encoding import decode_ahead


def test_rows_are_decoded_ahead_of_the_encoder_across_chunks_and_no_further():
    """Every row once, in order, whatever thread read it; never more than `ahead` that were not asked for."""
    started, taken, most = [], 0, 0

    def reader(number, row):
        nonlocal most
        started.append(number)
        most = max(most, len(started) - taken)
        time.sleep(0.002 * (number % 3))
        return {"row": number, "image": row["value"]}

    chunks = [(index, 10 * index, [{"value": 10 * index + i} for i in range(10)]) for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for index, row, read in decode_ahead(iter(chunks), reader, pool, ahead=6):
            assert (index, row["value"], read) == (taken // 10, taken, {"row": taken, "image": taken})
            if taken == 9:  # the last row of a chunk: rows of the next one are there before it is asked for
                deadline = time.monotonic() + 30
                while len(started) <= 13 and time.monotonic() < deadline:
                    time.sleep(0.001)
                assert len(started) > 13
            taken += 1
    assert taken == 40
    assert sorted(started) == list(range(40))
    assert most <= 7
