//! What the simulated driver answers when it will not.

use nvml_wrapper_sys::bindings as nvml;

/// An error code of NVML.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// `nvmlInit` was not called.
    #[error("the library is not initialised")]
    Uninitialized,
    /// A handle, id or pointer means nothing.
    #[error("invalid argument")]
    InvalidArgument,
    /// The device cannot do this (now).
    #[error("not supported")]
    NotSupported,
    /// There is no such thing.
    #[error("not found")]
    NotFound,
    /// The caller's buffer is too small.
    #[error("insufficient size")]
    InsufficientSize,
    /// No machine to simulate.
    #[error("driver not loaded")]
    DriverNotLoaded,
    /// Nothing happened in the time given.
    #[error("timeout")]
    Timeout,
    /// The GPU fell off the bus.
    #[error("GPU is lost")]
    GpuIsLost,
    /// It takes effect after a reset.
    #[error("GPU requires reset")]
    ResetRequired,
    /// Something still uses it.
    #[error("in use by another client")]
    InUse,
    /// There is no room for it.
    #[error("insufficient resources")]
    InsufficientResources,
    /// A structure of a version this library does not know.
    #[error("argument version mismatch")]
    ArgumentVersionMismatch,
    /// The state file cannot be read or written, or a bug.
    #[error("unknown error")]
    Unknown,
}

impl Refusal {
    /// NVML's number for it.
    #[must_use]
    pub fn code(self) -> nvml::nvmlReturn_t {
        match self {
            Self::Uninitialized => nvml::nvmlReturn_enum_NVML_ERROR_UNINITIALIZED,
            Self::InvalidArgument => nvml::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT,
            Self::NotSupported => nvml::nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED,
            Self::NotFound => nvml::nvmlReturn_enum_NVML_ERROR_NOT_FOUND,
            Self::InsufficientSize => nvml::nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE,
            Self::DriverNotLoaded => nvml::nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED,
            Self::Timeout => nvml::nvmlReturn_enum_NVML_ERROR_TIMEOUT,
            Self::GpuIsLost => nvml::nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST,
            Self::ResetRequired => nvml::nvmlReturn_enum_NVML_ERROR_RESET_REQUIRED,
            Self::InUse => nvml::nvmlReturn_enum_NVML_ERROR_IN_USE,
            Self::InsufficientResources => nvml::nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_RESOURCES,
            Self::ArgumentVersionMismatch => nvml::nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
            Self::Unknown => nvml::nvmlReturn_enum_NVML_ERROR_UNKNOWN,
        }
    }
}
