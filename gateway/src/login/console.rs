//! A person's terminal with what login needs of it: lines that are redrawn in place, and input that was
//! typed ahead.
//!
//! No mode of the terminal is ever changed (no other screen, no hidden cursor, no colours), so that nothing
//! is left behind when a connection breaks.

use super::{Input, Terminal};
use mlad::channel::PtySize;
use std::io;

/// Bytes typed ahead that are kept here. More are left with the terminal, and with the client in the end.
pub(super) const MAX_AHEAD: usize = 4096;

/// A person's terminal.
pub(super) struct Console<'a> {
    terminal: &'a mut dyn Terminal,
    size: PtySize,
    /// Whether it can move its cursor.
    moves: bool,
    /// Lines on the screen that the next drawing replaces; the cursor is in the last of them.
    drawn: Vec<String>,
    ahead: Vec<u8>,
    /// Whether a Ctrl-C came that is not in `ahead`.
    interrupted: bool,
    /// Whether nothing more will be typed.
    ended: bool,
}

/// What came from the terminal.
pub(super) enum Event {
    /// Something was typed, or typing has come to its end: what there is of it the console knows.
    Typed,
    Resized,
    HungUp,
}

impl<'a> Console<'a> {
    pub(super) fn new(terminal: &'a mut dyn Terminal) -> Self {
        let size = terminal.size();
        let moves = !matches!(terminal.term(), "" | "dumb" | "unknown");
        Self { terminal, size, moves, drawn: Vec::new(), ahead: Vec::new(), interrupted: false, ended: false }
    }

    /// Whether lines can be redrawn in place.
    pub(super) fn moves(&self) -> bool {
        self.moves
    }

    /// Its width, 80 if that is not known.
    pub(super) fn columns(&self) -> usize {
        at_least_one(self.size.columns, 80)
    }

    /// Its height, 24 if that is not known.
    pub(super) fn rows(&self) -> usize {
        at_least_one(self.size.rows, 24)
    }

    /// Waits for input. Cancel-safe.
    pub(super) async fn event(&mut self) -> Event {
        match self.terminal.read(MAX_AHEAD.saturating_sub(self.ahead.len())).await {
            Ok(Some(Input::Bytes(bytes))) => {
                self.ahead.extend(bytes);
                Event::Typed
            }
            Ok(Some(Input::Interrupt)) => {
                self.interrupted = true;
                Event::Typed
            }
            Ok(Some(Input::End)) => {
                self.ended = true;
                Event::Typed
            }
            Ok(Some(Input::Resize(size))) => {
                self.size = size;
                Event::Resized
            }
            Ok(None) | Err(_) => Event::HungUp,
        }
    }

    /// Takes what was typed and not used.
    pub(super) fn take_ahead(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.ahead)
    }

    /// Takes the first byte that was typed and not used.
    pub(super) fn next_byte(&mut self) -> Option<u8> {
        (!self.ahead.is_empty()).then(|| self.ahead.remove(0))
    }

    /// Whether Ctrl-C was typed, however far behind what was typed before it.
    pub(super) fn interrupted(&self) -> bool {
        self.interrupted || self.ahead.contains(&0x03)
    }

    /// Whether all that was typed is used, and nothing more will be.
    pub(super) fn is_silent(&self) -> bool {
        self.ended && self.ahead.is_empty()
    }

    /// Puts lines in the place of those drawn last. They must not be wider than the terminal less one.
    pub(super) async fn draw(&mut self, lines: &[String]) -> io::Result<()> {
        if self.drawn == lines {
            return Ok(());
        }
        let mut text = self.back();
        text.push_str(&lines.join("\r\n"));
        self.drawn = lines.to_vec();
        self.terminal.write(text.as_bytes()).await
    }

    /// Takes away what was drawn last.
    pub(super) async fn erase(&mut self) -> io::Result<()> {
        if self.drawn.is_empty() {
            return Ok(());
        }
        let text = self.back();
        self.drawn.clear();
        self.terminal.write(text.as_bytes()).await
    }

    /// Writes a line that stays, in the place of what was drawn last.
    pub(super) async fn print(&mut self, line: &str) -> io::Result<()> {
        let mut text = self.back();
        self.drawn.clear();
        text.push_str(line);
        text.push_str("\r\n");
        self.terminal.write(text.as_bytes()).await
    }

    /// Writes without ending the line.
    pub(super) async fn write(&mut self, text: &str) -> io::Result<()> {
        self.terminal.write(text.as_bytes()).await
    }

    /// After a resize nobody knows where what was drawn has got to: it stays, and the next is drawn below.
    pub(super) async fn resized(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.drawn).is_empty() {
            return Ok(());
        }
        self.terminal.write(b"\r\x1b[J\r\n").await
    }

    /// To the beginning of what was drawn last, all behind it erased.
    fn back(&self) -> String {
        match self.drawn.len() {
            0 => String::new(),
            1 => "\r\x1b[J".to_owned(),
            lines => format!("\r\x1b[{}A\x1b[J", lines - 1),
        }
    }
}

fn at_least_one(number: u32, otherwise: usize) -> usize {
    usize::try_from(number).ok().filter(|number| *number > 0).unwrap_or(otherwise)
}
