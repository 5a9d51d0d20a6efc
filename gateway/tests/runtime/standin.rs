//! What a container does when its agent is not ours: takes the agent's place and does as it is told.
//!
//! Built by the tests with rustc alone, static. How it behaves from the start stands in its configuration as
//! `MLAD_TEST_CONDUCT`; afterwards it takes one command line per connection and answers with one line.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::{
        fs::symlink,
        net::{UnixListener, UnixStream},
    },
    process::exit,
    thread,
    time::Duration,
};

const FOLDER: &str = "/run/mlad/agent";

fn main() {
    let config = fs::read_to_string(format!("{FOLDER}/config.json")).expect("a configuration");
    match conduct(&config) {
        "listen" => listen(),
        "fail" => {
            eprintln!("no device for me");
            exit(3)
        }
        // A job that is over before anybody looks.
        "finish" => {
            drop(UnixListener::bind(format!("{FOLDER}/agent.sock")).expect("a socket"));
            fs::write(format!("{FOLDER}/result.json"), "{\"status\":4}").expect("a result");
        }
        // Binds, and listens only after a while: connections are refused until then.
        "late" => {
            drop(UnixListener::bind(format!("{FOLDER}/agent.sock")).expect("a socket"));
            thread::sleep(Duration::from_millis(300));
            fs::remove_file(format!("{FOLDER}/agent.sock")).expect("a removal");
            listen()
        }
        other => panic!("no conduct {other:?}"),
    }
}

fn conduct(config: &str) -> &str {
    config.split("\"MLAD_TEST_CONDUCT\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or("listen")
}

fn listen() {
    let part = format!("{FOLDER}/part.sock");
    let listener = UnixListener::bind(&part).expect("a socket");
    fs::rename(part, format!("{FOLDER}/agent.sock")).expect("a name");
    for stream in listener.incoming().flatten() {
        thread::spawn(move || serve(stream));
    }
}

fn serve(mut stream: UnixStream) {
    let mut line = String::new();
    if BufReader::new(&stream).read_line(&mut line).unwrap_or(0) > 0 {
        let words: Vec<&str> = line.split_whitespace().collect();
        let _ = writeln!(stream, "{}", obey(&words));
    }
}

fn obey(words: &[&str]) -> String {
    match words {
        ["tcp", address] => tcp(address),
        ["udp", address] => udp(address, b"hello"),
        // Asks the resolver of the container for the address of a.test.
        ["name", resolver] => udp(resolver, b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\x04test\0\0\x01\0\x01"),
        ["serve", port] => serve_tcp(port.parse().expect("a port")),
        ["environment", name] => std::env::var(name).unwrap_or_else(|_| "unset".into()),
        ["read", path] => fs::read_to_string(path).map_or_else(|error| error.to_string(), |text| text.replace('\n', "|")),
        ["write", path, text] => fs::write(path, text).map_or_else(|error| error.to_string(), |()| "done".into()),
        ["unlink", path] => fs::remove_file(path).map_or_else(|error| error.to_string(), |()| "done".into()),
        ["link", target, name] => {
            let _ = fs::remove_file(name);
            symlink(target, name).map_or_else(|error| error.to_string(), |()| "done".into())
        }
        ["eat"] => {
            let mut eaten: Vec<Vec<u8>> = Vec::new();
            loop {
                eaten.push(vec![1; 1 << 20]);
            }
        }
        ["exit", code] => exit(code.parse().expect("a code")),
        other => format!("what is {other:?}?"),
    }
}

fn tcp(address: &str) -> String {
    let address: SocketAddr = address.parse().expect("an address");
    match TcpStream::connect_timeout(&address, Duration::from_secs(3)) {
        Ok(_) => "open".into(),
        Err(error) => format!("closed: {error}"),
    }
}

fn udp(address: &str, question: &[u8]) -> String {
    let talk = || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        socket.connect(address)?;
        socket.send(question)?;
        let mut answer = [0; 512];
        socket.recv(&mut answer).map(|count| answer[..count].to_vec())
    };
    match talk() {
        Ok::<_, std::io::Error>(answer) => format!("open: {answer:?}"),
        Err(error) => format!("closed: {error}"),
    }
}

fn serve_tcp(port: u16) -> String {
    // Of both families, where there are two.
    let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port))).expect("a port");
    thread::spawn(move || listener.incoming().for_each(drop));
    "done".into()
}
