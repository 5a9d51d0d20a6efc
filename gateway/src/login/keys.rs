//! From the bytes a terminal sends to the keys a menu knows. Pure.

/// A key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Up,
    Down,
    Digit(u8),
    Erase,
    Enter,
    GiveUp,
}

/// Where in an escape sequence the last byte was.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum At {
    #[default]
    Ground,
    /// After a carriage return: a line feed that follows belongs to it.
    Return,
    Escape,
    /// In a control sequence, until its final byte.
    Control,
    /// After ESC O: one byte more.
    Single,
}

/// Reads keys from bytes, however those are cut.
#[derive(Debug, Default)]
pub(super) struct Keys(At);

impl Keys {
    /// The key that ends with this byte, if one does.
    pub(super) fn read(&mut self, byte: u8) -> Option<Key> {
        let at = std::mem::take(&mut self.0);
        // Whoever wants to leave must be able to, whatever came before.
        if byte == 0x03 {
            return Some(Key::GiveUp);
        }
        match at {
            At::Return if byte == b'\n' => None,
            At::Ground | At::Return => self.ground(byte),
            At::Escape => {
                match byte {
                    b'[' => self.0 = At::Control,
                    b'O' => self.0 = At::Single,
                    0x1b => self.0 = At::Escape,
                    _ => {}
                }
                None
            }
            At::Control if !(0x40..=0x7e).contains(&byte) => {
                self.0 = At::Control;
                None
            }
            At::Control | At::Single => match byte {
                b'A' => Some(Key::Up),
                b'B' => Some(Key::Down),
                _ => None,
            },
        }
    }

    fn ground(&mut self, byte: u8) -> Option<Key> {
        match byte {
            0x1b => {
                self.0 = At::Escape;
                None
            }
            b'\r' => {
                self.0 = At::Return;
                Some(Key::Enter)
            }
            b'\n' => Some(Key::Enter),
            b'k' | 0x10 => Some(Key::Up),
            b'j' | 0x0e => Some(Key::Down),
            b'0'..=b'9' => Some(Key::Digit(byte - b'0')),
            0x08 | 0x7f => Some(Key::Erase),
            b'q' | 0x04 => Some(Key::GiveUp),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Vec<Key> {
        let mut keys = Keys::default();
        bytes.iter().filter_map(|byte| keys.read(*byte)).collect()
    }

    #[test]
    fn arrows_letters_and_digits() {
        assert_eq!(read(b"\x1b[A\x1bOBkj\x10\x0e"), [Key::Up, Key::Down, Key::Up, Key::Down, Key::Up, Key::Down]);
        assert_eq!(read(b"12\x7f\r\n"), [Key::Digit(1), Key::Digit(2), Key::Erase, Key::Enter]);
        assert_eq!(read(b"\n\n"), [Key::Enter, Key::Enter]);
        assert_eq!(read(b"\x1b[1;5A\x1b[3~x\xc3\xa9"), [Key::Up]);
    }

    proptest! {
        #[test]
        fn control_c_gives_up_whatever_came_before(bytes: Vec<u8>) {
            let mut keys = Keys::default();
            for byte in bytes {
                keys.read(byte);
            }
            prop_assert_eq!(keys.read(3), Some(Key::GiveUp));
        }
    }
}
