//! The far end of `scp -O`: the old protocol, which is lines of text, each answered by a byte.
//!
//! `scp -t TARGET` receives ([`sink`]), `scp -f SOURCE…` sends ([`source`]). There is no specification; this
//! follows OpenSSH's `scp.c`.

mod glob;
mod sink;
mod source;
mod wire;

use super::WorkerError;
use crate::files::Jail;
use rustix::io::Errno;
use std::os::unix::ffi::OsStringExt as _;
use wire::Wire;

/// Folders inside one another.
const MAX_DEPTH: usize = 256;

/// The options of `scp`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Options {
    /// `-t`: receive. Else `-f`: send.
    receive: bool,
    /// `-r`: folders, too.
    recursive: bool,
    /// `-p`: times and modes, too.
    preserve: bool,
    /// `-d`: the target must be a folder.
    folder: bool,
}

/// Why a file, or everything, cannot be copied.
enum ScpError {
    /// The other side has been or can be told, and the rest can go on.
    File(String),
    /// The connection or the protocol is broken.
    Fatal(WorkerError),
}

impl From<WorkerError> for ScpError {
    fn from(error: WorkerError) -> Self {
        Self::Fatal(error)
    }
}

impl From<std::io::Error> for ScpError {
    fn from(error: std::io::Error) -> Self {
        Self::Fatal(error.into())
    }
}

fn file_error(path: &[u8], error: Errno) -> ScpError {
    let text = std::io::Error::from(error).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    ScpError::File(format!("{}: {text}", String::from_utf8_lossy(path)))
}

/// Serves one command; `words` are those after `scp`, quoted as `files::scp_command` does. The status is 0
/// if everything was copied.
pub(super) fn serve(jail: &Jail, words: &[Vec<u8>]) -> Result<u8, WorkerError> {
    let (options, patterns) = parse(words)?;
    let mut wire = Wire::new();
    let result = expand(jail, patterns).and_then(|paths| {
        if options.receive {
            sink::receive(&mut wire, options, &paths)
        } else {
            source::send(&mut wire, options, &paths)
        }
    });
    match result {
        Ok(()) => Ok(u8::from(wire.failures > 0)),
        Err(error) => {
            // Best effort: it may be the connection that is broken.
            let _ = wire.fatal(&error.to_string());
            Err(error)
        }
    }
}

fn expand(jail: &Jail, patterns: &[Vec<u8>]) -> Result<Vec<Vec<u8>>, WorkerError> {
    let home = jail.virtual_home().into_os_string().into_vec();
    let (mut budget, mut paths) = (glob::Budget::default(), Vec::new());
    for word in patterns {
        paths.append(&mut glob::expand(&jail.user, &home, word, &mut budget)?);
    }
    Ok(paths)
}

fn parse(words: &[Vec<u8>]) -> Result<(Options, &[Vec<u8>]), WorkerError> {
    let mut options = Options::default();
    let mut rest = words;
    while let Some((word, tail)) = rest.split_first() {
        let Some(letters) = word.strip_prefix(b"-").filter(|letters| !letters.is_empty()) else { break };
        rest = tail;
        if letters == b"-" {
            break;
        }
        for letter in letters {
            match letter {
                b't' => options.receive = true,
                b'r' => options.recursive = true,
                b'p' => options.preserve = true,
                b'd' => options.folder = true,
                b'f' | b'v' | b'q' => {}
                _ => return Err(WorkerError::Usage("an unknown option of scp".into())),
            }
        }
    }
    Ok((options, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_end_where_paths_begin() {
        let words = |line: &str| line.split(' ').map(|word| word.as_bytes().to_vec()).collect::<Vec<_>>();
        let line = words("-rp -d -t -- -x");
        let (options, paths) = parse(&line).unwrap();
        assert_eq!(options, Options { receive: true, recursive: true, preserve: true, folder: true });
        assert_eq!(paths, [b"-x"]);
        let line = words("-f a -r");
        assert_eq!(parse(&line).unwrap().1.len(), 2);
        assert!(parse(&words("-S x -t .")).is_err());
    }
}
