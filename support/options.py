"""From the fields of registered objectives to flags, and from what the flags were given to an objective.

A registry is {flag: class of objective}; `objectives.py` has the one that counts.
"""

import argparse
import inspect
from dataclasses import MISSING, fields

from support.cli import BadInput, dashed, positive, real
from support.objective import show


def all_options(registry):
    """{name of an option: {flag of each objective that has it: its dataclass field}}. BadInput where a class
    is wrong."""
    found = {}
    for name, cls in registry.items():
        options = {option.name: option for option in fields(cls)}
        for option in inspect.get_annotations(cls):
            if option not in options:
                raise BadInput(f"{option} of the objective {name} is no option yet: put "
                               f"@dataclass(frozen=True) above class {cls.__name__}")
        for option in options.values():
            if option.default is MISSING:
                raise BadInput(f"the option {option.name} of the objective {name} has no default; give one")
            found.setdefault(option.name, {})[name] = option
    return found


def share_options(registry, names, given):
    """{name: its options} of what was given for several objectives: an option goes to those that have it; one
    that none of them has goes to all, which refuse it."""
    owners = all_options(registry)
    return {name: {option: value for option, value in given.items()
                   if name in owners[option] or not owners[option].keys() & set(names)} for name in names}


def add_flags(parser, registry):
    """One flag for each option. Objectives that share a name share the flag, so its text is read by
    `make`."""
    for name, owners in all_options(registry).items():
        texts = [f"{owner}: {option.metadata.get('help') or name} (default: {show(option.default)})"
                 for owner, option in owners.items()]
        how = {"help": "; ".join(texts).replace("%", "%%"), "default": None}
        switches = {isinstance(option.default, bool) for option in owners.values()}
        if len(switches) > 1:
            raise BadInput(f"the option {name} is a switch in some of {', '.join(owners)} only: rename it")
        how |= {"action": argparse.BooleanOptionalAction} if True in switches else {"metavar": name.upper()}
        try:
            parser.add_argument(dashed(name), **how)
        except argparse.ArgumentError:
            raise BadInput(f"the option {name} of {' and '.join(owners)} is already a flag of this command: "
                           "rename the field") from None


def make(registry, name, options):
    """The objective of that flag with those options, as values or as text; None leaves a default."""
    if name not in registry:
        raise BadInput(f"there is no objective {name!r}; choose one of {', '.join(registry)}")
    known, given = all_options(registry), {}
    ours = [option for option in known if name in known[option]]
    takes = f"{name} takes {' and '.join(map(dashed, ours)) or 'no options'}"
    for option, value in options.items():
        if value is None:
            continue
        if option not in known:
            raise BadInput(f"no objective has an option {dashed(option)}; {takes}")
        if option not in ours:
            owners = list(known[option])
            raise BadInput(f"{dashed(option)} belongs to {' and '.join(owners)}, and {takes}; leave out "
                           f"{dashed(option)} or type --objective {owners[0]}")
        given[option] = value_of(known[option][name], value)
    return registry[name](**given)


def value_of(option, value):
    """An option's value from its text, or from what may be its value already."""
    kind, read = type(option.default), option.metadata.get("type")
    if isinstance(value, str) and (read or kind is not str):
        read = read or {int: positive, float: real}.get(kind)
        if read is None:
            raise BadInput(f"{dashed(option.name)}: no text is a {kind.__name__}; write the field as "
                           "option(default, help, type), with a type that reads it")
        try:
            value = read(value)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise BadInput(f"{dashed(option.name)}: {error}") from None
    elif not read and type(value) not in (kind, int if kind is float else kind):
        raise BadInput(f"{dashed(option.name)} {value!r} is a {type(value).__name__}, not a {kind.__name__}")
    if isinstance(value, (tuple, list)):
        return tuple(value) if len(value) > 1 else value[0]
    return value
