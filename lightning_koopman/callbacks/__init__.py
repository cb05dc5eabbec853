"""Lightning callbacks: they decide when; the numerics they call know nothing of Lightning."""

import lightning_koopman.callbacks.roots  # noqa: F401 - before anything else imports a root of Lightning
