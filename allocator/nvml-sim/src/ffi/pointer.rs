//! The pointers of NVML's callers, as types: what they mean is written once, here.
//!
//! Each is as large as the pointer it holds and can only come from a caller of an exported function, who
//! promised by calling NVML that it is null or points to a place of that type.

use std::ffi::{c_char, c_uint};

use crate::refusal::Refusal;

/// Characters read of a string at most.
const MAX_STRING: usize = 4096;

/// A place for one value.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Refuses null. To be asked before anything is done that the caller could not be told of.
    pub fn check(&self) -> Result<(), Refusal> {
        if self.0.is_null() { Err(Refusal::InvalidArgument) } else { Ok(()) }
    }

    /// Gives the value to the caller.
    pub fn put(&self, value: T) -> Result<(), Refusal> {
        self.check()?;
        // SAFETY: not null, so by the caller's promise a place for a T.
        unsafe { self.0.write(value) };
        Ok(())
    }

    /// The place as that of another version of the structure. The caller said which by [`Out::version`].
    pub fn cast<U>(&self) -> Out<U> {
        Out(self.0.cast())
    }

    /// The first member of a versioned structure, which the caller has filled in.
    pub fn version(&self) -> Result<c_uint, Refusal> {
        self.check()?;
        // SAFETY: not null, so by the caller's promise a structure that begins with its version.
        Ok(unsafe { self.0.cast::<c_uint>().read() })
    }
}

impl Out<c_uint> {
    /// A number the caller has filled in.
    pub fn get(&self) -> Result<c_uint, Refusal> {
        self.version()
    }
}

/// A value of the caller's.
#[repr(transparent)]
pub struct In<T>(*const T);

impl<T: Copy> In<T> {
    /// The value.
    pub fn get(&self) -> Result<T, Refusal> {
        if self.0.is_null() {
            return Err(Refusal::InvalidArgument);
        }
        // SAFETY: not null, so by the caller's promise a T.
        Ok(unsafe { self.0.read() })
    }
}

impl In<c_char> {
    /// The string that begins here, if it is UTF-8 and not too long.
    pub fn text(&self) -> Result<String, Refusal> {
        if self.0.is_null() {
            return Err(Refusal::InvalidArgument);
        }
        let mut bytes = Vec::new();
        for at in 0..MAX_STRING {
            // SAFETY: not null and no character before this one was the last, so by the caller's promise
            // within a string that ends with 0.
            let byte = unsafe { self.0.add(at).cast::<u8>().read() };
            if byte == 0 {
                return String::from_utf8(bytes).map_err(|_| Refusal::InvalidArgument);
            }
            bytes.push(byte);
        }
        Err(Refusal::InvalidArgument)
    }
}

/// A place for a string or for several values, as long as the caller says elsewhere.
#[repr(transparent)]
pub struct Buffer<T>(*mut T);

impl<T: Copy> Buffer<T> {
    /// Refuses null.
    pub fn check(&self) -> Result<(), Refusal> {
        if self.is_null() { Err(Refusal::InvalidArgument) } else { Ok(()) }
    }

    /// Whether the caller gave none.
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// Gives the values to the caller, who promised room for as many.
    pub fn put_all(&self, values: &[T]) -> Result<(), Refusal> {
        self.check()?;
        // SAFETY: not null, so by the caller's promise places for as many T; `values` is ours and elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.0, values.len()) };
        Ok(())
    }

    /// Gives the values to a caller who says in `count` for how many there is room, and learns there how many
    /// there are.
    pub fn put_counted(&self, count: &Out<c_uint>, values: &[T]) -> Result<(), Refusal> {
        let room = count.get()?;
        let length = c_uint::try_from(values.len()).map_err(|_| Refusal::Unknown)?;
        count.put(length)?;
        if room < length {
            return Err(Refusal::InsufficientSize);
        }
        if values.is_empty() { Ok(()) } else { self.put_all(values) }
    }
}

impl Buffer<c_char> {
    /// Gives a string to a caller who has `length` bytes for it.
    pub fn put_text(&self, length: c_uint, text: &str) -> Result<(), Refusal> {
        let bytes: Vec<c_char> = text.bytes().chain([0]).map(u8::cast_signed).collect();
        if usize::try_from(length).map_err(|_| Refusal::InvalidArgument)? < bytes.len() {
            self.check()?;
            return Err(Refusal::InsufficientSize);
        }
        self.put_all(&bytes)
    }
}

/// `text` in a member of a structure, cut if it is too long, ended with 0.
pub fn member<const N: usize>(text: &str) -> [c_char; N] {
    let mut member = [0; N];
    let room = N.saturating_sub(1);
    for (place, byte) in member.iter_mut().take(room).zip(text.bytes()) {
        *place = byte.cast_signed();
    }
    member
}
