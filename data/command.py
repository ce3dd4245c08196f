"""How the scripts of this folder start: they read flags, and tell wrong input in one line with exit status 2."""

import errno
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from absl import app, flags

from anisora_jax import errors

T = TypeVar("T")
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

  _told_apart(define_flags)  # a config that has a default is read, with the flags of its fields, where it is defined
  app.run(lambda _: errors.run(start), flags_parser=lambda arguments: _told_apart(lambda: _parse(arguments)))


def _parse(arguments: list[str]) -> list[str]:
  rest = flags.FLAGS(arguments)
  if "config" in flags.FLAGS:
    list(flags.FLAGS["config"].value or ())  # a file that could not be read says so when it is first looked at
  if len(rest) > 1:
    raise errors.BadInput(f"unexpected words {' '.join(rest[1:])}: flags are written --name value or --name=value.")
  return rest


def _told_apart(read: Callable[[], T]) -> T:
  """What `read` returns; exits with one line where absl or ml_collections find something wrong."""
  try:
    return read()
  except flags.UnrecognizedFlagError as error:
    own = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]  # those of libraries are not meant
    mistake = f"no flag is named --{error.flagname}: {errors.nearest(error.flagname, own, 'see --help.')}"
  except (AttributeError, KeyError) as error:
    mistake = f"no config field is named {' '.join(str(error.args[0]).split())}"
  except OSError as error:
    path = re.search(r"Relative path\]:\s+(\S+)", str(error))
    mistake = f"config file {path.group(1) if path else ''} cannot be read: give a file of configs/."
  except (flags.Error, ValueError, TypeError) as error:
    mistake = " ".join(str(error).split())
  sys.exit(_told(mistake))


def _told(mistake: str) -> int:
  def fail() -> None:
    raise errors.BadInput(mistake)
  return errors.run(fail)
