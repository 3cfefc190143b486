"""Every error a request can meet, with the HTTP status and OpenAI code it becomes.

ServeError                    500 server_error             something of ours broke
├── InvalidRequest            400 invalid_value            `param` names what is wrong
│   ├── ContextLengthExceeded 400 context_length_exceeded  the prompt is longer than the context
│   └── Unsupported           400 unsupported_parameter    understood, but not done here
├── Unauthenticated           401 invalid_api_key          no key, a wrong or expired one
├── Forbidden                 403 insufficient_permissions a good key that may not do this
├── NotFound                  404 not_found                no such route, response or item
│   └── ModelNotFound         404 model_not_found          a model name not served here
├── MethodNotAllowed          405 method_not_allowed       the route takes another method
├── TooLarge                  413 request_too_large        the body is over the limit
├── RateLimited               429 rate_limit_exceeded      this key's budget is spent
│   └── Overloaded            429 overloaded               the queue is full
├── EngineFailed              500 engine_error             the model's step failed for this one
│   └── OutOfMemory           500 out_of_memory            it did not fit beside the others
└── Unavailable               503 unavailable              draining, or the engine is down
    └── ModelLoading          503 model_loading            weights are still coming

A message is for the caller: it never holds an address, a path of this machine or a trace; those
go to the log. Foreign exceptions are mapped at the layer that meets them. Imports nothing.
"""

from __future__ import annotations


class ServeError(Exception):
    status = 500
    type = "server_error"
    code: str | None = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(ServeError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unsupported(InvalidRequest):
    code = "unsupported_parameter"


class Unauthenticated(ServeError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(ServeError):
    status = 403
    type = "permission_error"
    code = "insufficient_permissions"


class NotFound(ServeError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(ServeError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class TooLarge(ServeError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class RateLimited(ServeError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Overloaded(RateLimited):
    code = "overloaded"


class EngineFailed(ServeError):
    code = "engine_error"


class OutOfMemory(EngineFailed):
    code = "out_of_memory"


class Unavailable(ServeError):
    status = 503
    type = "server_error"
    code = "unavailable"


class ModelLoading(Unavailable):
    code = "model_loading"
