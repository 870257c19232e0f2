"""Which threat models the attacks of a suite run under."""

from __future__ import annotations

from typing import Any

from robustlab.types import CorruptionSuite, Suite, Threat, UserError


def threats_of(suite: Suite, threat: Threat | None) -> list[Threat]:
    """The threat models of a suite's attacks: its norms times its radii, else those that all its attacks name, else the caller's.

    Raises:
        UserError: there are attacks and no threat model, an attack that does not know the norm, or one that names another.
    """
    if not suite.attacks:
        return []
    norms = suite.norms or _common([a.norm for a in suite.attacks]) or ((threat.norm,) if threat else ())
    radii = suite.eps or _common([a.eps for a in suite.attacks]) or ((threat.eps,) if threat else ())
    if not norms or not radii:
        missing = " and ".join(name for name, given in (("norm", norms), ("eps", radii)) if not given)
        raise UserError(f"suite '{suite.name}': give {missing} of the threat model, for example --norm linf --eps 8/255")
    try:
        threats = [Threat(norm, eps) for norm in norms for eps in radii]
    except ValueError as error:
        raise UserError(f"suite '{suite.name}': {error}") from error
    for t in threats:
        for a in suite.attacks:
            if t.norm not in a.norms:
                raise UserError(f"the attack '{a.name}' does not work in {t.norm}; it works in {', '.join(a.norms)}")
            if a.norm not in (None, t.norm) or a.eps not in (None, t.eps):
                own = f"{a.norm or t.norm} {t.eps if a.eps is None else a.eps:g}"
                raise UserError(f"the attack '{a.name}' has its own threat model, {own}; the evaluation's is {t.norm} {t.eps:g}")
    return threats


def _common(values: list[Any]) -> tuple[Any, ...]:
    """The value, if all of them are that one; nothing if one is open or two differ."""
    return (values[0],) if values[0] is not None and all(v == values[0] for v in values) else ()


def corruption_threat(suite: Suite, threat: Threat | None) -> Threat | None:
    """The one threat model under which a suite attacks corrupted images; None where it does not.

    Raises:
        UserError: as :func:`threats_of`; or there are several.
    """
    if not isinstance(suite, CorruptionSuite) or suite.attack is None:
        return None
    found = threats_of(Suite(attacks=(suite.attack,), norms=suite.norms, eps=suite.eps), threat)
    if len(found) > 1:
        raise UserError(f"suite '{suite.name}': corrupted images are attacked under one threat model, got {len(found)}")
    return found[0]
