"""How the scripts of this folder start: they read flags, and tell wrong input in one line with exit status 2."""

import errno
import sys
from collections.abc import Callable

from absl import app, flags

from anisora_jax import errors

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


def run(define_flags: Callable[[], None], main: Callable[[flags.FlagValues], None]) -> None:
  """Defines the flags, reads them, hands them to `main`, and exits. --help is answered from the script's docstring."""
  def start() -> None:
    try:
      main(flags.FLAGS)
    except OSError as error:
      if error.errno not in _DISK:
        raise
      raise errors.BadInput(f"cannot write {error.filename or 'the result'}: {error.strerror}; make room or take "
                            "another folder and run again, what is finished is kept.") from error

  define_flags()
  app.run(lambda _: errors.run(start), flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(arguments)
  except flags.UnrecognizedFlagError as error:
    sys.exit(_told(f"no flag is named --{error.flagname}: {errors.nearest(error.flagname, flags.FLAGS)}"))
  except (AttributeError, KeyError) as error:
    sys.exit(_told(f"no config field is named {' '.join(str(error.args[0]).split())}"))
  except OSError as error:
    sys.exit(_told(f"the config file cannot be read ({' '.join(str(error).split())[:200]}): give a file of configs/."))
  except (flags.Error, ValueError, TypeError) as error:
    sys.exit(_told(" ".join(str(error).split())))
  if len(rest) > 1:
    sys.exit(_told(f"unexpected words {' '.join(rest[1:])}: flags are written --name value or --name=value."))
  return rest


def _told(mistake: str) -> int:
  def fail() -> None:
    raise errors.BadInput(mistake)
  return errors.run(fail)
