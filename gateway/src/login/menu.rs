//! A list to choose from: what the keys do to it and what it looks like. Pure.

use super::{
    keys::Key,
    text::MENU_HELP,
    width::{fit, pad, width},
};

/// Widest the column of names gets.
const MAX_NAME: usize = 24;

/// A list to choose one item from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Menu {
    title: &'static str,
    /// Names, and what there is to say of each.
    items: Vec<(String, String)>,
    selected: usize,
    /// The number that is being typed.
    typed: usize,
}

/// What a key did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pressed {
    /// Nothing to see, or another item.
    On,
    Chosen(usize),
    GaveUp,
}

impl Menu {
    pub(super) fn new(title: &'static str, items: Vec<(String, String)>, selected: usize) -> Self {
        let selected = selected.min(items.len().saturating_sub(1));
        Self { title, items, selected, typed: 0 }
    }

    pub(super) fn title(&self) -> &'static str {
        self.title
    }

    pub(super) fn len(&self) -> usize {
        self.items.len()
    }

    pub(super) fn name(&self, at: usize) -> &str {
        self.items.get(at).map_or("", |(name, _)| name)
    }

    pub(super) fn press(&mut self, key: Key) -> Pressed {
        let last = self.items.len().saturating_sub(1);
        match key {
            Key::Up => self.selected = if self.selected == 0 { last } else { self.selected - 1 },
            Key::Down => self.selected = if self.selected == last { 0 } else { self.selected + 1 },
            Key::Digit(digit) => {
                self.type_digit(usize::from(digit));
                return Pressed::On;
            }
            Key::Erase => {}
            Key::Enter => return Pressed::Chosen(self.selected),
            Key::GiveUp => return Pressed::GaveUp,
        }
        self.typed = 0;
        Pressed::On
    }

    /// Goes on with the number that is being typed where that is one, else begins anew with this digit.
    fn type_digit(&mut self, digit: usize) {
        let longer = self.typed * 10 + digit;
        let number = if (1..=self.items.len()).contains(&longer) { longer } else { digit };
        if (1..=self.items.len()).contains(&number) {
            self.typed = number;
            self.selected = number - 1;
        } else {
            self.typed = 0;
        }
    }

    /// The lines, none wider than the terminal less one column, and no more than its rows.
    pub(super) fn lines(&self, columns: usize, rows: usize) -> Vec<String> {
        let columns = columns.saturating_sub(1);
        let mut lines = vec![fit(&format!("{}  ({MENU_HELP})", self.title), columns)];
        let visible = rows.saturating_sub(1).clamp(1, self.items.len().max(1));
        let first = (self.selected + 1).saturating_sub(visible);
        let numbers = self.items.len().to_string().len();
        let names = self.items.iter().map(|(name, _)| width(name)).max().unwrap_or(0).min(MAX_NAME);
        for (at, (name, note)) in self.items.iter().enumerate().skip(first).take(visible) {
            let mark = if at == self.selected { '>' } else { ' ' };
            let name = pad(&fit(name, MAX_NAME), names);
            let line = format!("{mark} {:>numbers$}  {name}  {note}", at + 1);
            lines.push(fit(line.trim_end(), columns));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn menu(count: usize) -> Menu {
        let items = (1..=count).map(|at| (format!("item{at}"), format!("note {at}"))).collect();
        Menu::new("Which?", items, 0)
    }

    #[test]
    fn it_looks_like_this() {
        let mut menu = menu(3);
        menu.press(Key::Down);
        assert_eq!(
            menu.lines(80, 24),
            [
                "Which?  (arrows or a number, Enter; Ctrl-C gives up)",
                "  1  item1  note 1",
                "> 2  item2  note 2",
                "  3  item3  note 3",
            ]
        );
        assert_eq!(menu.lines(10, 24), ["Which?  …", "  1  ite…", "> 2  ite…", "  3  ite…"]);
        assert_eq!(menu.lines(80, 2), ["Which?  (arrows or a number, Enter; Ctrl-C gives up)", "> 2  item2  note 2"]);
    }

    #[test]
    fn numbers_of_two_digits_are_typed_one_by_one() {
        let mut menu = menu(12);
        for (digit, selected) in [(1, 0), (2, 11), (3, 2), (0, 2), (1, 0), (1, 10), (9, 8)] {
            menu.press(Key::Digit(digit));
            assert_eq!(menu.selected, selected, "{digit}");
        }
        assert_eq!(menu.press(Key::Enter), Pressed::Chosen(8));
    }

    #[test]
    fn it_goes_round() {
        let mut menu = menu(2);
        menu.press(Key::Up);
        assert_eq!(menu.selected, 1);
        menu.press(Key::Down);
        assert_eq!(menu.selected, 0);
        assert_eq!(menu.press(Key::GiveUp), Pressed::GaveUp);
    }

    fn keys() -> impl Strategy<Value = Key> {
        prop_oneof![Just(Key::Up), Just(Key::Down), Just(Key::Erase), (0u8..10).prop_map(Key::Digit)]
    }

    proptest! {
        #[test]
        fn the_selected_item_is_always_seen_and_nothing_is_too_wide(
            count in 1usize..40,
            keys in prop::collection::vec(keys(), 0..20),
            columns in 0usize..100,
            rows in 0usize..50,
        ) {
            let mut menu = menu(count);
            for key in keys {
                menu.press(key);
            }
            let lines = menu.lines(columns, rows);
            prop_assert!(lines.iter().all(|line| width(line) <= columns.saturating_sub(1)));
            prop_assert!(lines.len() <= rows.max(2));
            if columns > 4 {
                prop_assert!(lines.iter().any(|line| line.starts_with('>')), "{lines:?}");
            }
        }
    }
}
