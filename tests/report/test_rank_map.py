import pytest

from geolora_pl.report.rank_map import RankMap, depth_label


def test_kinds_are_rows_and_depths_are_columns_also_where_layers_are_missing():
    places = RankMap.of(["m.0.fc1", "m.0.fc2", "m.10.fc1", "m.2.fc1", "m.2.fc2"])
    assert places.kinds == ("m.*.fc1", "m.*.fc2")
    assert places.depths == ((0,), (2,), (10,))
    ranks = {"m.0.fc1": 3, "m.0.fc2": 4, "m.10.fc1": 5, "m.2.fc1": 6, "m.2.fc2": 7}
    assert places.rows(ranks) == [[3, 6, 5], [4, 7, None]]
    assert places.of_kind("m.*.fc1") == ["m.0.fc1", "m.2.fc1", "m.10.fc1"]


@pytest.mark.parametrize(
    ("names", "kinds", "depths"),
    [
        (["b.0.layer.1.wi", "b.1.layer.1.wi"], ["b.*.layer.1.wi"], [(0,), (1,)]),  # T5: the second is no depth
        (["s.0.b.0.fc", "s.0.b.1.fc", "s.1.b.0.fc"], ["s.*.b.*.fc"], [(0, 0), (0, 1), (1, 0)]),  # Swin
        (["b.3.layer.1.wi"], ["b.*.layer.1.wi"], [(3,)]),
        (["stem", "b.0.fc", "b.1.fc"], ["stem", "b.*.fc"], [(), (0,), (1,)]),
        (["0", "2"], ["0", "2"], [()]),
    ],
)
def test_what_a_number_in_a_name_means(names, kinds, depths):
    places = RankMap.of(names)
    assert (list(places.kinds), list(places.depths)) == (kinds, depths)
    assert set(places.places) == set(names)


def test_labels_leave_out_what_all_have_in_common_and_stay_distinct():
    places = RankMap.of(["m.h.0.attn.q", "m.h.1.attn.q", "m.h.0.mlp.q", "m.h.1.mlp.q"])
    assert list(places.short_kinds().values()) == ["attn.q", "mlp.q"]
    assert list(places.short_names().values()) == ["attn.q 0", "attn.q 1", "mlp.q 0", "mlp.q 1"]
    assert RankMap.of(["m.fc"]).short_names() == {"m.fc": "fc"}
    assert depth_label(()) == ""


def test_some_of_the_adapters_are_spread_evenly_over_all_kinds():
    places = RankMap.of([f"blocks.{i}.{name}" for i in range(500) for name in ("fc", "proj")])
    some = places.thinned(101)
    assert len(some.places) == 101
    assert (min(some.depths), max(some.depths)) == ((0,), (499,))
    assert [len(some.of_kind(kind)) for kind in places.kinds] in ([50, 51], [51, 50])
    assert all(places.places[name] == place for name, place in some.places.items())
    assert some.firsts() <= set(some.places)
    assert places.thinned(1000) == places
