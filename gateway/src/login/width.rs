//! Text on a terminal: how wide it is, and what must not get there. Pure.

use unicode_width::UnicodeWidthChar as _;

/// The text without control characters and without those that reorder what is around them, at most `most`
/// characters of it.
pub(super) fn clean(text: &str, most: usize) -> String {
    text.chars().filter(|letter| !letter.is_control() && !reorders(*letter)).take(most).collect()
}

fn reorders(letter: char) -> bool {
    matches!(letter, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Columns the text takes.
pub(super) fn width(text: &str) -> usize {
    text.chars().map(|letter| letter.width().unwrap_or(0)).sum()
}

/// The text in at most `columns`; ends with `…` if some of it had to go.
pub(super) fn fit(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let mut fitted = String::new();
    let mut used = 0;
    for letter in text.chars() {
        used += letter.width().unwrap_or(0);
        if used >= columns {
            break;
        }
        fitted.push(letter);
    }
    if columns > 0 {
        fitted.push('…');
    }
    fitted
}

/// The text with spaces behind it, `columns` wide.
pub(super) fn pad(text: &str, columns: usize) -> String {
    format!("{text}{}", " ".repeat(columns.saturating_sub(width(text))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn wide_letters_count_twice() {
        assert_eq!(width("슬라이스"), 8);
        assert_eq!(fit("슬라이스", 8), "슬라이스");
        assert_eq!(fit("슬라이스", 7), "슬라이…");
        assert_eq!(fit("슬라이스", 6), "슬라…");
        assert_eq!(fit("abc", 1), "…");
        assert_eq!(fit("abc", 0), "");
        assert_eq!(pad("슬", 4), "슬  ");
    }

    #[test]
    fn what_a_terminal_obeys_is_taken_out() {
        assert_eq!(clean("a\x1b[2Jb\r\n\u{9b}31m\u{202e}c\u{7f}", 64), "a[2Jb31mc");
        assert_eq!(clean("abcdef", 3), "abc");
    }

    proptest! {
        #[test]
        fn what_fits_fits(text in "\\PC{0,40}", columns in 0usize..60) {
            prop_assert!(width(&fit(&text, columns)) <= columns);
        }
    }
}
