from __future__ import annotations

import pytest

from omnimoe.registry import Registry, RegistryError
from tests.refusals import refused


class Circle:
    pass


class Square:
    pass


@pytest.fixture
def shapes() -> Registry[type]:
    registry: Registry[type] = Registry("shape")
    registry.register("circle")(Circle)
    return registry


def test_register_returns_the_part_and_files_it(shapes):
    assert shapes.register("square")(Square) is Square
    assert shapes.get("square") is Square
    assert shapes.names() == list(shapes) == ["circle", "square"]
    assert "square" in shapes
    assert "oval" not in shapes


@pytest.mark.parametrize("name", ["a", "0", "mot_7b", "bagel_7b.und-gen", "a.b-c_d"])
def test_well_formed_names(shapes, name):
    shapes.register(name)(Square)
    assert shapes.get(name) is Square


@pytest.mark.hazard(30)
@pytest.mark.parametrize("name", ["", "Circle", "a b", "_a", ".a", "-a", "a/b", "../a", "a\n", "é"])
def test_malformed_name_raises_and_files_nothing(shapes, name):
    with refused(shapes, "may only hold lower-case letters", RegistryError):
        shapes.register(name)
    assert shapes.names() == ["circle"]


@pytest.mark.hazard(30)
@pytest.mark.parametrize("name", [None, 3, Square, ("a",)])
def test_a_name_that_is_no_string_raises(shapes, name):
    with refused(shapes, "write register(name)", RegistryError):
        shapes.register(name)
    assert shapes.names() == ["circle"]


@pytest.mark.hazard(30)
def test_taken_name_raises_and_keeps_the_first(shapes):
    with refused(shapes, "'circle' is already registered as", RegistryError) as told:
        shapes.register("circle")(Square)
    assert "Circle; choose another name or pass exist_ok=True" in str(told)
    assert shapes.get("circle") is Circle


def test_same_part_may_be_filed_twice(shapes):
    assert shapes.register("circle")(Circle) is Circle


def test_exist_ok_replaces(shapes):
    shapes.register("circle", exist_ok=True)(Square)
    assert shapes.get("circle") is Square


def test_a_part_without_a_name_of_its_own_is_shown_by_value():
    numbers: Registry[int] = Registry("number")
    numbers.register("one")(1)
    with pytest.raises(RegistryError, match="already registered as 1;"):
        numbers.register("one")(2)


def test_unknown_name_suggests_the_nearest(shapes):
    shapes.register("square")(Square)
    with pytest.raises(RegistryError, match=r"^unknown shape 'circel'; did you mean 'circle'\? Known: circle, square$"):
        shapes.get("circel")


def test_unknown_name_with_nothing_near_lists_what_is_known(shapes):
    with pytest.raises(RegistryError, match="^unknown shape 'zzz'; Known: circle$"):
        shapes.get("zzz")


def test_unknown_name_in_an_empty_registry():
    with pytest.raises(RegistryError, match="^unknown shape 'a'; Known: none yet$"):
        Registry("shape").get("a")


def test_a_long_list_of_known_names_is_cut():
    numbers: Registry[int] = Registry("number")
    for number in range(15):
        numbers.register(f"n{number:02}")(number)
    with pytest.raises(RegistryError, match=r"Known: n00, .*n11 and 3 more$"):
        numbers.get("zzz")


def test_remove(shapes):
    shapes.remove("circle")
    assert shapes.names() == []
    with pytest.raises(RegistryError, match="unknown shape 'circle'"):
        shapes.remove("circle")


@pytest.mark.parametrize(
    "look_up", [lambda r: r.get("square"), lambda r: r.names(), lambda r: "square" in r, list, lambda r: r.hint("s")]
)
def test_loader_runs_once_before_the_first_look_up(shapes, look_up):
    runs = []
    shapes.on_first_use(lambda: (runs.append(1), shapes.register("square")(Square)))
    assert runs == []
    look_up(shapes)
    look_up(shapes)
    assert runs == [1]
    assert shapes.get("square") is Square


def test_loader_may_look_up_and_may_add_a_loader(shapes):
    def load():
        assert shapes.get("circle") is Circle
        shapes.on_first_use(lambda: shapes.register("square")(Square))

    shapes.on_first_use(load)
    assert shapes.names() == ["circle", "square"]


@pytest.mark.hazard(30)
def test_failing_loader_is_tried_again_and_never_leaves_a_half_filled_table(shapes):
    failures = [ImportError("no such library")]

    def load():
        if failures:
            raise failures.pop()
        shapes.register("square")(Square)

    shapes.on_first_use(load)
    with refused(shapes, "no such library", ImportError):
        shapes.get("square")
    assert shapes.get("square") is Square


def test_built_in_part_that_loads_late_can_be_replaced_early():
    shapes: Registry[type] = Registry("shape")
    shapes.on_first_use(lambda: shapes.register("circle")(Circle))
    shapes.register("circle", exist_ok=True)(Square)
    assert shapes.get("circle") is Square


def test_the_error_is_a_value_error():
    assert issubclass(RegistryError, ValueError)
