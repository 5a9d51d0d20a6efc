//! `~` and `*?[…]` in the words of a command, as a POSIX shell expands them. `\` takes away a character's
//! meaning. Names are bytes, so none of the crates for patterns over text would do.

use rustix::fs::{Dir, Mode, OFlags};

/// Paths one word may become.
const MAX_PATHS: usize = 100_000;

/// The paths that `word` stands for, in the order of their bytes; the word itself if there is none.
pub(super) fn expand(user: &str, home: &[u8], word: &[u8]) -> Vec<Vec<u8>> {
    let word = expand_home(user, home, word);
    let mut found = vec![if word.starts_with(b"/") { b"/".to_vec() } else { Vec::new() }];
    if !has_pattern(&word) {
        return vec![unquote(&word)];
    }
    for component in word.split(|byte| *byte == b'/').filter(|component| !component.is_empty()) {
        found = found.iter().flat_map(|folder| step(folder, component)).take(MAX_PATHS).collect();
    }
    found.sort();
    if found.is_empty() { vec![unquote(&word)] } else { found }
}

fn expand_home(user: &str, home: &[u8], word: &[u8]) -> Vec<u8> {
    let Some(rest) = word.strip_prefix(b"~") else { return word.to_vec() };
    let rest = rest.strip_prefix(user.as_bytes()).unwrap_or(rest);
    if rest.is_empty() || rest.starts_with(b"/") { [home, rest].concat() } else { word.to_vec() }
}

/// The paths in `folder` that match one component.
fn step(folder: &[u8], component: &[u8]) -> Vec<Vec<u8>> {
    let join = |name: &[u8]| match folder {
        b"" | b"/" => [folder, name].concat(),
        _ => [folder, b"/", name].concat(),
    };
    if !has_pattern(component) {
        let path = join(&unquote(component));
        return if rustix::fs::lstat(path.as_slice()).is_ok() { vec![path] } else { Vec::new() };
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(if folder.is_empty() { b"." } else { folder }, flags, Mode::empty());
    let Ok(entries) = opened.and_then(Dir::new) else { return Vec::new() };
    let names = entries.map_while(Result::ok).map(|entry| entry.file_name().to_bytes().to_vec());
    names
        // A name with a dot in front is matched by a dot only; so `.` and `..` are not by `*`.
        .filter(|name| !name.starts_with(b".") || (component.starts_with(b".") && *name != b"." && *name != b".."))
        .filter(|name| matches(component, name))
        .map(|name| join(&name))
        .collect()
}

fn has_pattern(word: &[u8]) -> bool {
    let mut bytes = word.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => drop(bytes.next()),
            b'*' | b'?' | b'[' => return true,
            _ => {}
        }
    }
    false
}

fn unquote(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut bytes = word.iter();
    while let Some(byte) = bytes.next() {
        plain.extend(if *byte == b'\\' { bytes.next().or(Some(byte)) } else { Some(byte) });
    }
    plain
}

/// Whether all of `name` matches `pattern`. Only the last `*` is ever gone back to, which is enough and keeps
/// the time to the product of the lengths.
fn matches(mut pattern: &[u8], mut name: &[u8]) -> bool {
    let mut last_star: Option<(&[u8], &[u8])> = None;
    loop {
        if let Some(rest) = pattern.strip_prefix(b"*") {
            last_star = Some((rest, name));
            pattern = rest;
            continue;
        }
        match (name.split_first(), match_one(pattern, name.first().copied())) {
            (None, _) if pattern.is_empty() => return true,
            (Some((_, rest_of_name)), Some(rest)) => (pattern, name) = (rest, rest_of_name),
            _ => match last_star {
                Some((after_star, [_, from @ ..])) => {
                    last_star = Some((after_star, from));
                    (pattern, name) = (after_star, from);
                }
                _ => return false,
            },
        }
    }
}

/// The rest of the pattern if its first element matches `byte`.
fn match_one(pattern: &[u8], byte: Option<u8>) -> Option<&[u8]> {
    let byte = byte?;
    match pattern.split_first()? {
        (b'?', rest) => Some(rest),
        (b'\\', rest) => rest.split_first().filter(|(literal, _)| **literal == byte).map(|(_, rest)| rest),
        (b'[', inside) => match set(inside, byte) {
            Some((contains, rest)) => contains.then_some(rest),
            // Never closed: a bracket like any other character.
            None => (byte == b'[').then_some(inside),
        },
        (literal, rest) => (*literal == byte).then_some(rest),
    }
}

/// Whether the set, which begins after its `[`, contains `byte`, and what follows it; `None` if it has no end.
fn set(mut inside: &[u8], byte: u8) -> Option<(bool, &[u8])> {
    let negated = matches!(inside.first(), Some(b'!' | b'^'));
    if negated {
        inside = inside.get(1..)?;
    }
    let (mut contains, mut first) = (false, true);
    loop {
        let (low, rest) = inside.split_first()?;
        match (low, rest) {
            (b']', _) if !first => return Some((contains != negated, rest)),
            (b'\\', [literal, rest @ ..]) => {
                contains |= *literal == byte;
                inside = rest;
            }
            (low, [b'-', high, rest @ ..]) if *high != b']' => {
                contains |= (*low..=*high).contains(&byte);
                inside = rest;
            }
            (low, rest) => {
                contains |= *low == byte;
                inside = rest;
            }
        }
        first = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_match_as_in_a_shell() {
        for (pattern, name) in [
            ("*", "abc"),
            ("*.csv", "a.csv"),
            ("a?c", "abc"),
            ("[a-c]x", "bx"),
            ("[!a-c]x", "dx"),
            ("[]x]", "]"),
            ("a*b*c", "a--b--b--c"),
            (r"\*", "*"),
            ("[x", "[x"),
            ("", ""),
            ("**", ""),
            (r"[\]]", "]"),
            ("[a-]", "-"),
        ] {
            assert!(matches(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
        }
        for (pattern, name) in
            [("*.csv", "a.cs"), ("a?c", "ac"), ("[a-c]x", "dx"), (r"\*", "a"), ("a*b", "a--bc"), ("", "a"), ("?", "")]
        {
            assert!(!matches(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
        }
    }

    #[test]
    fn words_become_paths() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap().as_bytes();
        for name in ["b.csv", "a.csv", ".hidden.csv", "c.txt", "d/x.csv", "[1].csv"] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let expand = |word: &str| -> Vec<String> {
            let strip = |path: Vec<u8>| String::from_utf8_lossy(path.strip_prefix(home).unwrap_or(&path)).into_owned();
            expand("alice", home, word.as_bytes()).into_iter().map(strip).collect()
        };
        assert_eq!(expand("~/*.csv"), ["/[1].csv", "/a.csv", "/b.csv"]);
        assert_eq!(expand("~alice/*/*.csv"), ["/d/x.csv"]);
        assert_eq!(expand("~/.*"), ["/.hidden.csv"]);
        assert_eq!(expand("~/d"), ["/d"]);
        assert_eq!(expand(r"~/\[1].csv"), ["/[1].csv"]);
        assert_eq!(expand("~bob/x"), ["~bob/x"]);
        assert_eq!(expand(r"\~/x\*"), ["~/x*"]);
        assert_eq!(expand("~/*.none"), ["/*.none"], "without a match the word stays");
    }

    proptest! {
        #[test]
        fn a_quoted_name_matches_itself(name in prop::collection::vec(any::<u8>(), 0..30)) {
            let pattern: Vec<u8> = name.iter().flat_map(|byte| [b'\\', *byte]).collect();
            prop_assert!(matches(&pattern, &name));
            prop_assert_eq!(unquote(&pattern), name);
        }

        #[test]
        fn any_pattern_ends(pattern in "[ab*?\\[\\]\\\\!-]{0,40}", name in "[ab]{0,60}") {
            let _ = matches(pattern.as_bytes(), name.as_bytes());
        }
    }
}
