//! Rows A1, A6, C6: a person at a terminal is asked what they want, and sees what they wait for.

use mlad_tests::{Outcome, Person, Site, SiteBuilder, eventually};
use std::{thread, time::Duration};

const LONG: Duration = Duration::from_secs(60);

/// One A30: a single 4g.24gb, two 2g.12gb, or four 1g.6gb.
fn small() -> SiteBuilder {
    Site::builder().machine("driver_version = \"550.54.15\"\n[[gpu]]\nmodel = \"A30-24GB\"\ncount = 1\nmig = true\n")
}

fn waits(site: &Site) -> usize {
    site.mlad_json(&["who"])["waits"].as_array().unwrap().len()
}

/// What somebody sees who waits behind a job with a time limit of half an hour: reason, place, estimate.
const SEES_THE_WAIT: &str = "expect -re {waiting for 4g\\.24gb: none is free, place 1 of 1, about (29|30) min} {} \
                             timeout { exit 10 } eof { exit 11 }\n";

#[test]
fn whoever_waits_at_a_terminal_sees_why_and_may_give_up_or_gets_in() {
    let site = small().setting("workspace", "default_need = \"4g.24gb\"").start();
    let people: Vec<Person> = ["holder", "second", "third"].iter().map(|name| site.person(name)).collect();
    let [holder, second, third] = people.as_slice() else { panic!("three") };
    let job = holder.ssh("mlad submit --gpu 4g.24gb --time 30m -- sleep 10000").success().text();
    eventually("the job holds it all", LONG, || site.containers() == [format!("j-{job}-1")]);

    let given_up = second.at_a_terminal(&format!(
        "{SEES_THE_WAIT}send \"\\003\"\n\
         expect \"the place in the queue is given back\" {{}} timeout {{ exit 12 }} eof {{ exit 13 }}"
    ));
    assert_eq!(given_up.code, 130, "{}", given_up.text());
    assert_eq!(waits(&site), 0, "the place is given back");

    let third = third.clone();
    let waiting = thread::spawn(move || {
        third.at_a_terminal(&format!(
            "{SEES_THE_WAIT}expect -re {{\\$ $}} {{}} timeout {{ exit 14 }} eof {{ exit 15 }}\n\
             send \"echo mine=\\$NVIDIA_VISIBLE_DEVICES; exit 5\\r\"\n\
             expect -re {{mine=MIG-}} {{}} timeout {{ exit 16 }} eof {{ exit 17 }}"
        ))
    });
    eventually("the third waits", LONG, || waits(&site) == 1);
    holder.ssh(&format!("mlad cancel {job}")).success();
    let inside = waiting.join().unwrap();
    assert_eq!(inside.code, 5, "{}", inside.text());
}

#[test]
fn whoever_has_no_default_is_asked_at_a_terminal_and_refused_without() {
    let site = small().without("workspace", "default_image").without("workspace", "default_need").start();
    let alice = site.person("alice");
    let silent = alice.ssh("true").exits(2);
    assert!(silent.stdout.is_empty() && silent.stderr.contains("MLAD_IMAGE"), "{}", silent.stderr);
    let only_image = Outcome::of(&mut alice.ssh_command(&["-o", "SetEnv=MLAD_IMAGE=base"], &["true"])).exits(2);
    assert!(only_image.stderr.contains("MLAD_GPU"), "{}", only_image.stderr);

    // The image by Enter on what is marked, the slice by its number.
    let asked = alice.at_a_terminal(
        "expect -re {> +[0-9]+  base } {} timeout { exit 10 } eof { exit 11 }\n\
         send \"\\r\"\n\
         expect \"Which image? base\" {} timeout { exit 12 } eof { exit 13 }\n\
         expect -re { ([0-9]+)  2g\\.12gb +[0-9]+ MiB  2 of 2 free} {} timeout { exit 14 } eof { exit 15 }\n\
         send \"$expect_out(1,string)\\r\"\n\
         expect \"Which GPU slice? 2g.12gb\" {} timeout { exit 16 } eof { exit 17 }\n\
         expect -re {\\$ $} {} timeout { exit 18 } eof { exit 19 }\n\
         send \"exit 6\\r\"",
    );
    assert_eq!(asked.code, 6, "{}", asked.text());
    let lease = &site.mlad_json(&["who"])["leases"][0];
    assert_eq!((lease["user"].as_str(), lease["profile"].as_str()), (Some("alice"), Some("2g.12gb")));

    // Nobody is asked about a workspace that is there, and Ctrl-C gives up.
    alice.ssh("true").success();
    let bob = site.person("bob").at_a_terminal(
        "expect \"Which image?\" {} timeout { exit 10 } eof { exit 11 }\n\
         send \"\\003\"\n\
         expect \"Given up.\" {} timeout { exit 12 } eof { exit 13 }",
    );
    assert_eq!(bob.code, 130, "{}", bob.text());
    assert_eq!(site.containers().len(), 1, "nothing was started for bob");
}
