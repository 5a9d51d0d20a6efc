//! Whether a command line is the plain command `mlad`, and its words.

/// What makes a line more than one plain command.
const METACHARACTERS: &[u8] = b";|&<>`$(){}*?[]#~!\n\r\0";

/// The arguments of `mlad` if `line` is that command and nothing else; none if it is another, or one that
/// needs a shell: those run in the workspace.
///
/// Words are split as a POSIX shell does: blanks, single and double quotes, backslash.
pub(super) fn mlad_arguments(line: &[u8]) -> Option<Vec<String>> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = split(line)?.into_iter();
    if words.next()? != "mlad" {
        return None;
    }
    Some(words.collect())
}

fn split(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut symbols = line.chars();
    while let Some(symbol) = symbols.next() {
        match symbol {
            ' ' | '\t' => words.extend(word.take()),
            '\'' => single_quoted(&mut symbols, word.get_or_insert_default())?,
            '"' => double_quoted(&mut symbols, word.get_or_insert_default())?,
            '\\' => word.get_or_insert_default().push(symbols.next().filter(|symbol| *symbol != '\n')?),
            symbol if is_metacharacter(symbol) => return None,
            symbol => word.get_or_insert_default().push(symbol),
        }
    }
    words.extend(word);
    Some(words)
}

fn single_quoted(symbols: &mut std::str::Chars<'_>, word: &mut String) -> Option<()> {
    loop {
        match symbols.next()? {
            '\'' => return Some(()),
            '\0' => return None,
            symbol => word.push(symbol),
        }
    }
}

fn double_quoted(symbols: &mut std::str::Chars<'_>, word: &mut String) -> Option<()> {
    loop {
        match symbols.next()? {
            '"' => return Some(()),
            '$' | '`' | '\0' => return None,
            '\\' => match symbols.next()? {
                symbol @ ('$' | '`' | '"' | '\\') => word.push(symbol),
                '\n' => {}
                symbol => word.extend(['\\', symbol]),
            },
            symbol => word.push(symbol),
        }
    }
}

fn is_metacharacter(symbol: char) -> bool {
    u8::try_from(symbol).is_ok_and(|byte| METACHARACTERS.contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(line: &str) -> Option<Vec<String>> {
        mlad_arguments(line.as_bytes())
    }

    #[test]
    fn words_are_split_as_a_shell_does() {
        for (line, expected) in [
            ("mlad", vec![]),
            ("  mlad \t ps  ", vec!["ps"]),
            ("mlad run -- sh -c 'echo $HOME; exit 3'", vec!["run", "--", "sh", "-c", "echo $HOME; exit 3"]),
            (r#"mlad a" b "c \"d\" "\x\"" """#, vec!["a b c", "\"d\"", "\\x\"", ""]),
            (r"mlad a\ b \;", vec!["a b", ";"]),
            ("'mlad' ''", vec![""]),
        ] {
            assert_eq!(words(line).unwrap(), expected, "{line}");
        }
    }

    #[test]
    fn what_needs_a_shell_or_is_another_command_is_not_ours() {
        let others = [
            "",
            "ls",
            "mladx",
            "/usr/bin/mlad ps",
            "mlad ps | wc",
            "mlad ps; ls",
            "mlad ps > x",
            "mlad $HOME",
            "mlad `id`",
            "mlad \"$HOME\"",
            "mlad 'open",
            "mlad \"open",
            "mlad \\",
            "mlad *.py",
            "mlad ps &",
            "mlad ~",
            "mlad\nls",
        ];
        for other in others {
            assert_eq!(words(other), None, "{other}");
        }
        assert_eq!(mlad_arguments(b"mlad \xff"), None);
    }

    proptest! {
        #[test]
        fn quoted_words_come_back_whole(arguments in proptest::collection::vec("[^\0']{0,12}", 0..6)) {
            let line = arguments.iter().fold("mlad".to_owned(), |line, word| format!("{line} '{word}'"));
            prop_assert_eq!(words(&line), Some(arguments));
        }

        #[test]
        fn no_line_is_too_strange(line in any::<Vec<u8>>()) {
            let _ = mlad_arguments(&line);
        }
    }
}
