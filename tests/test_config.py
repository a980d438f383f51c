from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnimoe.config import Config, ConfigError, Configurable, register
from omnimoe.registry import Registry, RegistryError

if TYPE_CHECKING:
    from fractions import Fraction

ENGINES: Registry[type[Engine]] = Registry("engine")
WHEELS: Registry = Registry("wheel")


class Engine(Configurable):
    registry: ClassVar[Registry | None] = ENGINES

    @dataclass(frozen=True, kw_only=True)
    class Config(Config):
        power: int = 1
        """In kilowatts."""

    def __init__(self, config: Engine.Config, *, width: int = 0) -> None:
        self.config, self.width = config, width


@register(ENGINES, "diesel")
class Diesel(Engine):
    @dataclass(frozen=True, kw_only=True)
    class Config(Engine.Config):
        cylinders: int = 4


@register(ENGINES, "turbo_diesel")
class TurboDiesel(Diesel):
    """Has no Config of its own."""


@register(ENGINES, "electric")
class Electric(Engine):
    @dataclass(frozen=True, kw_only=True)
    class Config(Config):
        volts: float = 400.0


class Prototype(Engine):
    """Is not registered."""


@dataclass(frozen=True, kw_only=True)
class Size(Config):
    """Groups values; nothing is built from it."""

    length: float
    width: float = 1.0


class Car(Configurable):
    @dataclass(frozen=True, kw_only=True)
    class Config(Config):
        engine: Engine.Config = Diesel.Config()
        spare: Engine.Config | None = None
        size: Size = Size(length=4.0)
        name: str | tuple[str, ...] = "car"
        gears: tuple[int, ...] = ()
        axles: tuple[Size, ...] = ()
        pair: tuple[Size, Engine.Config] | None = None
        options: dict[str, Size] = dataclass_field(default_factory=dict)
        notes: dict[str, Any] = dataclass_field(default_factory=dict)
        anything: Any = None

    def __init__(self, config: Car.Config) -> None:
        self.config = config


class Exotic(Configurable):
    @dataclass(frozen=True, kw_only=True)
    class Config(Config):
        share: Fraction = None


def through_json(config: Config) -> Config:
    return type(config).from_dict(json.loads(json.dumps(config.to_dict())))


FULL = Car.Config(
    engine=Electric.Config(volts=800.0),
    spare=TurboDiesel.Config(power=7, cylinders=3),
    size=Size(length=3.5, width=1.5),
    name=("a", "b"),
    gears=(3, 1, 2),
    axles=(Size(length=1.0), Size(length=2.0)),
    pair=(Size(length=9.0), Electric.Config()),
    options={"short": Size(length=0.5)},
    notes={"nested": {"deep": (1, (2, 3))}},
    anything=((1, 2), None, True),
)


@pytest.mark.parametrize(
    "config", [Car.Config(), FULL, Size(length=2.0)], ids=["defaults", "every field", "values only"]
)
def test_round_trip_through_json(config):
    back = through_json(config)
    assert back == config
    assert type(back) is type(config)


def test_to_dict_writes_types_first_and_plain_values():
    assert Car.Config().to_dict()["engine"] == {"type": "diesel", "power": 1, "cylinders": 4}
    assert next(iter(Diesel.Config().to_dict())) == "type"
    assert "type" not in Car.Config().to_dict()
    assert FULL.to_dict()["axles"] == [{"length": 1.0, "width": 1.0}, {"length": 2.0, "width": 1.0}]


@given(
    st.builds(
        Car.Config,
        gears=st.lists(st.integers(-(2**40), 2**40)).map(tuple),
        name=st.text(),
        size=st.builds(Size, length=st.floats(allow_nan=False)),
    )
)
def test_round_trip_of_any_values(config):
    assert through_json(config) == config


def test_type_chooses_the_class():
    config = Engine.Config.from_dict({"type": "electric", "volts": 12.0})
    assert config == Electric.Config(volts=12.0)
    assert isinstance(config.build(), Electric)


def test_type_may_name_a_subclass_of_what_is_asked_for():
    assert type(Diesel.Config.from_dict({"type": "turbo_diesel"})) is TurboDiesel.Config


def test_type_may_be_left_out_where_the_class_is_registered():
    assert Diesel.Config.from_dict({"cylinders": 2}) == Diesel.Config(cylinders=2)


def test_type_of_another_kind_raises():
    with pytest.raises(ConfigError, match=r"Diesel\.Config is wanted, and engine 'electric' names class Electric"):
        Diesel.Config.from_dict({"type": "electric"})


def test_missing_type_raises_and_names_the_choices():
    with pytest.raises(ConfigError, match=r"Engine\.Config needs a 'type': one of diesel, electric, turbo_diesel"):
        Engine.Config.from_dict({"power": 3})


def test_unknown_type_raises_and_suggests():
    with pytest.raises(RegistryError, match="unknown engine 'deisel'; did you mean 'diesel'"):
        Car.Config.from_dict({"engine": {"type": "deisel"}})


@pytest.mark.parametrize("name", [None, 3, ["diesel"]])
def test_type_that_is_no_name_raises(name):
    with pytest.raises(ConfigError, match="is no engine name"):
        Engine.Config.from_dict({"type": name})


def test_type_where_there_is_no_choice_is_an_unknown_field():
    with pytest.raises(ConfigError, match=r"Car\.Config has no field 'type'"):
        Car.Config.from_dict({"type": "car"})


@pytest.mark.parametrize("make", [Car.Config.from_dict, lambda changes: Car.Config().replace(**changes)])
def test_unknown_field_raises_and_suggests(make):
    with pytest.raises(
        ConfigError, match=r"Car\.Config has no field 'engin'; did you mean 'engine'\? Fields: engine, spare"
    ):
        make({"engin": None})
    with pytest.raises(ConfigError, match="has no field 'zzzz'; Fields: engine"):
        make({"zzzz": 1})


def test_unknown_field_of_a_nested_config_raises():
    with pytest.raises(ConfigError, match=r"Diesel\.Config has no field 'volts'"):
        Car.Config.from_dict({"engine": {"type": "diesel", "volts": 1.0}})


def test_missing_field_raises():
    with pytest.raises(ConfigError, match="Size needs a value for length"):
        Car.Config.from_dict({"size": {"width": 2.0}})


@pytest.mark.parametrize("plain", [None, [], "diesel", 3])
def test_what_is_no_mapping_raises(plain):
    with pytest.raises(ConfigError, match="is read from a mapping, not from"):
        Car.Config.from_dict(plain)


def test_from_dict_leaves_its_argument_alone():
    plain = {"type": "diesel", "power": 2}
    Engine.Config.from_dict(plain)
    assert plain == {"type": "diesel", "power": 2}


def test_lists_become_tuples():
    config = Car.Config.from_dict({"gears": [1, 2], "anything": [1, [2]], "notes": {"a": [1]}})
    assert (config.gears, config.anything, config.notes) == ((1, 2), (1, (2,)), {"a": (1,)})


def test_tuple_of_another_length_than_annotated_is_left_as_it_is():
    assert Car.Config.from_dict({"pair": [1, 2, 3]}).pair == (1, 2, 3)


@pytest.mark.parametrize("value", [object(), Size, {1: 2}, {1}, b"x", (1, object())])
def test_what_is_no_plain_value_cannot_be_stored(value):
    with pytest.raises(ConfigError, match=r"Car\.Config\.anything holds .*plain values"):
        Car.Config(anything=value).to_dict()


def test_part_that_is_not_registered_cannot_be_stored():
    with pytest.raises(ConfigError, match=r"Prototype\.Config cannot be stored: its class is no registered engine"):
        Car.Config(engine=Prototype.Config()).to_dict()


def test_annotation_that_cannot_be_read_raises_and_says_where():
    with pytest.raises(ConfigError, match=r"Exotic\.Config\.share is annotated 'Fraction': .*import it in"):
        Exotic.Config.from_dict({"share": 1})


def test_build_passes_what_the_parent_knows():
    engine = Diesel.Config(cylinders=6).build(width=64)
    assert isinstance(engine, Diesel)
    assert (engine.config.cylinders, engine.width) == (6, 64)


def test_values_alone_build_nothing():
    with pytest.raises(ConfigError, match="Size groups values, nothing is built from it"):
        Size(length=1.0).build()


def test_subclass_without_a_config_gets_its_own():
    assert TurboDiesel.Config is not Diesel.Config
    assert issubclass(TurboDiesel.Config, Diesel.Config)
    assert TurboDiesel.Config.__qualname__ == "TurboDiesel.Config"
    assert TurboDiesel.Config.__module__ == __name__
    assert isinstance(TurboDiesel.Config(cylinders=2).build(), TurboDiesel)
    assert type(Diesel.Config().build()) is Diesel


def test_config_of_another_class_named_in_the_body_keeps_building_that_class():
    class Hybrid(Engine):
        Config = Diesel.Config

    assert type(Diesel.Config().build()) is Diesel
    assert type(Hybrid.Config(cylinders=3).build()) is Hybrid


def test_registered_name_is_not_inherited():
    class Racing(Diesel):
        pass

    assert Diesel.registered_name == "diesel"
    assert Racing.registered_name is None
    with pytest.raises(ConfigError, match="needs a 'type'"):
        Racing.Config.from_dict({})


def test_replace_returns_a_copy():
    config = Diesel.Config(power=5)
    assert config.replace(cylinders=8) == Diesel.Config(power=5, cylinders=8)
    assert config.cylinders == 4


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        Diesel.Config().power = 2
    with pytest.raises(TypeError, match="positional"):
        Diesel.Config(2)


@pytest.mark.parametrize("part", [int, lambda: None, Diesel.Config()])
def test_register_takes_configurable_classes_only(part):
    with pytest.raises(TypeError, match="engine 'odd' must be a class with a nested Config"):
        register(ENGINES, "odd")(part)
    assert "odd" not in ENGINES


def test_register_refuses_the_registry_of_another_kind():
    with pytest.raises(TypeError, match="Diesel cannot be wheel 'diesel'; its kind is engine"):
        register(WHEELS, "diesel")(Diesel)
    assert WHEELS.names() == []


def test_register_refuses_a_taken_name_and_leaves_the_part_unnamed():
    class Other(Engine):
        pass

    with pytest.raises(RegistryError, match="'diesel' is already registered"):
        register(ENGINES, "diesel")(Other)
    assert Other.registered_name is None


def test_register_replaces_when_asked():
    class Other(Engine):
        pass

    try:
        register(ENGINES, "diesel", exist_ok=True)(Other)
        assert isinstance(Engine.Config.from_dict({"type": "diesel"}).build(), Other)
    finally:
        register(ENGINES, "diesel", exist_ok=True)(Diesel)


def test_the_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)


def test_fields_that_count_from_one():
    diesel = Diesel.Config(cylinders=0)
    with pytest.raises(ConfigError, match="cylinders must be at least 1, got 0"):
        diesel.check_positive("power", "cylinders")
    diesel.replace(cylinders=1).check_positive("power", "cylinders")
