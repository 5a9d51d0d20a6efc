//! Whether a command line is the far end of an `scp -O`, without asking a shell.
//!
//! The client sends what a shell is to read: `scp -r -f 'my data'/*.csv`. Whatever needs more of a shell than
//! quoting, `~` and `*?[…]` is not for us; it goes to the container, which has one.

/// The words after `scp` if `line` is `scp -t …` or `scp -f …`. In them `\` stands before each character
/// that was quoted and would otherwise mean something to [`super::worker`]: ``\ ~ * ? [``.
pub(super) fn parse(line: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut words = split(line)?.into_iter();
    let program = words.next()?;
    if program != b"scp" && !program.ends_with(b"/scp") {
        return None;
    }
    let words: Vec<_> = words.collect();
    let (mut to, mut from) = (false, false);
    for word in &words {
        let Some(options) = word.strip_prefix(b"-").filter(|options| !options.is_empty()) else { break };
        if options == b"-" {
            break;
        }
        if !options.iter().all(|option| b"tfrpdvq".contains(option)) {
            return None;
        }
        to |= options.contains(&b't');
        from |= options.contains(&b'f');
    }
    (to != from).then_some(words)
}

/// The words of a line as a POSIX shell splits them, or `None` if it would do more than that.
fn split(line: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut rest = line.iter().copied();
    while let Some(byte) = rest.next() {
        match byte {
            b' ' | b'\t' => words.extend(word.take()),
            b'\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match rest.next()? {
                        b'\'' => break,
                        byte => push_quoted(word, byte),
                    }
                }
            }
            b'"' => double_quoted(&mut rest, word.get_or_insert_default())?,
            b'\\' => match rest.next()? {
                b'\n' => {}
                byte => push_quoted(word.get_or_insert_default(), byte),
            },
            b';' | b'&' | b'|' | b'<' | b'>' | b'(' | b')' | b'$' | b'`' | b'{' | b'\n' | b'\r' | 0 => return None,
            b'#' if word.is_none() => return None,
            byte => word.get_or_insert_default().push(byte),
        }
    }
    words.extend(word);
    Some(words)
}

fn double_quoted(rest: &mut impl Iterator<Item = u8>, word: &mut Vec<u8>) -> Option<()> {
    loop {
        match rest.next()? {
            b'"' => return Some(()),
            b'$' | b'`' | 0 => return None,
            b'\\' => match rest.next()? {
                b'\n' => {}
                byte @ (b'"' | b'\\' | b'$' | b'`') => push_quoted(word, byte),
                byte => {
                    push_quoted(word, b'\\');
                    push_quoted(word, byte);
                }
            },
            byte => push_quoted(word, byte),
        }
    }
}

fn push_quoted(word: &mut Vec<u8>, byte: u8) {
    if b"\\~*?[".contains(&byte) {
        word.push(b'\\');
    }
    word.push(byte);
}

#[cfg(test)]
mod tests {
    use super::parse;
    use proptest::prelude::*;

    fn words(line: &str) -> Option<Vec<String>> {
        parse(line.as_bytes()).map(|words| words.into_iter().map(|word| String::from_utf8(word).unwrap()).collect())
    }

    #[test]
    fn what_clients_send_is_understood() {
        assert_eq!(words("scp -t ."), Some(vec!["-t".into(), ".".into()]));
        assert_eq!(
            words("scp -r -p -d -t -- /home/a"),
            Some(["-r", "-p", "-d", "-t", "--", "/home/a"].map(String::from).to_vec())
        );
        assert_eq!(words("scp -rpf 'my data'/*.csv"), Some(vec!["-rpf".into(), "my data/*.csv".into()]));
        assert_eq!(words("/usr/bin/scp -v -f ~/x"), Some(vec!["-v".into(), "-f".into(), "~/x".into()]));
        assert_eq!(words(r#"scp -f "a b" c\ d '*' \~ "\*""#).unwrap()[1..], ["a b", "c d", r"\*", r"\~", r"\\\*"]);
        assert_eq!(words("scp -f ''").unwrap(), ["-f", ""]);
    }

    #[test]
    fn what_needs_a_shell_is_not_ours() {
        for line in [
            "",
            "scp",
            "scp a b",
            "scp -t x; id",
            "scp -t $HOME",
            "scp -t `id`",
            "scp -t x && id",
            "scp -t 'x",
            "scp -t \"$x\"",
            "scp -t x\\",
            "scp -S id -t x",
            "scpx -t .",
            "rsync --server",
            "sh -c 'scp -t x'",
            "scp -t x > y",
            "scp -f {a,b}",
            "scp -t -f x",
            "scp -- -t x",
            "scp -t #",
            "A=b scp -t x",
        ] {
            assert_eq!(words(line), None, "{line}");
        }
    }

    proptest! {
        #[test]
        fn a_single_quoted_word_comes_through(name in "[^'\0]{1,40}") {
            let line = format!("scp -t -- '{name}'");
            let words = parse(line.as_bytes()).unwrap();
            let mut plain = Vec::new();
            let mut bytes = words[2].iter();
            while let Some(&byte) = bytes.next() {
                plain.push(if byte == b'\\' { *bytes.next().unwrap() } else { byte });
            }
            prop_assert_eq!(plain, name.as_bytes());
        }

        #[test]
        fn no_line_is_a_panic(line in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = parse(&line);
        }
    }
}
