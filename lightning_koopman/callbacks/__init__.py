"""Lightning callbacks, which decide when to act. The numerics they call do not depend on Lightning."""

import lightning_koopman.callbacks.roots  # noqa: F401 - must run before anything else imports Lightning
