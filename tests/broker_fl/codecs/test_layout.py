import numpy as np
from codec_samples import MANIFESTS, is_small, layout
from hypothesis import given
from hypothesis import strategies as st

from broker_fl.codecs.layout import layout_of


@given(st.lists(st.sampled_from([1, 5, 1024, 1025, 1500]), min_size=1, max_size=8))
def test_ranks_count_the_elements_of_large_tensors(sizes):
    manifest = layout(**{f"tensor{number}": size for number, size in enumerate(sizes)})
    found = layout_of(manifest)
    large = np.flatnonzero(~is_small(manifest))
    assert found.large == large.size
    assert found.small.tolist() == np.flatnonzero(is_small(manifest)).tolist()
    assert found.positions(np.arange(found.large)).tolist() == large.tolist()
    some = np.arange(0, found.large, 3)
    assert found.positions(some).tolist() == large[some].tolist()
    vector = np.arange(manifest.size, dtype=np.float32)
    assert np.concatenate([vector[:0], *found.large_parts(vector)]).tolist() == large.tolist()


def test_runs_of_large_tensors_are_one_span():
    found = layout_of(MANIFESTS["small and large"])
    assert found.spans == ((10, 3010), (4034, 7059))
    assert found.large_tensors == ((10, 3010), (4034, 5059), (5059, 7059))
