//! The property collector: values of many objects, page by page.
//!
//! Owns: views and filters of one question, and that none is left behind. Never: interprets a value. A crash here leaves a view that ends
//! with its session. Source: vSphere Web Services API, PropertyCollector and ViewManager.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use roxmltree::Node;

use super::client::{CALL, Client, Error, PAGE, Session};
use super::wire::{self, MoRef};

/// Objects of one page. The server may give fewer.
const OBJECTS: u32 = 200;

/// Kinds of objects and the properties wanted of each.
pub type Wanted<'a> = [(&'a str, &'a [&'a str])];

/// Shows every object of these kinds below the root to `see`, with its `propSet` elements.
pub async fn all(client: &Client, session: &Session, wanted: &Wanted<'_>, mut see: impl FnMut(MoRef, Node<'_, '_>)) -> Result<(), Error> {
    let view = View::open(client, session, wanted).await?;
    let done = pages(client, session, &filter(wanted, &view.reference), &mut see).await;
    view.close(client, session).await;
    done
}

/// The same of those of these objects that are still there.
pub async fn several(
    client: &Client,
    session: &Session,
    objects: &[MoRef],
    wanted: &Wanted<'_>,
    mut see: impl FnMut(MoRef, Node<'_, '_>),
) -> Result<(), Error> {
    let mut spec = prop_set(wanted);
    for object in objects {
        let _ = write!(spec, "<objectSet><obj type=\"{}\">{}</obj></objectSet>", wire::quote(&object.kind), wire::quote(&object.value));
    }
    spec.push_str("<reportMissingObjectsInResults>true</reportMissingObjectsInResults>");
    pages(client, session, &spec, &mut see).await
}

/// The same of one object.
pub async fn one(
    client: &Client,
    session: &Session,
    object: &MoRef,
    properties: &[&str],
    mut see: impl FnMut(MoRef, Node<'_, '_>),
) -> Result<(), Error> {
    let mut spec = prop_set(&[(&object.kind, properties)]);
    let _ = write!(spec, "<objectSet><obj type=\"{}\">{}</obj></objectSet>", wire::quote(&object.kind), wire::quote(&object.value));
    pages(client, session, &spec, &mut see).await
}

async fn pages(client: &Client, session: &Session, spec: &str, see: &mut impl FnMut(MoRef, Node<'_, '_>)) -> Result<(), Error> {
    let collector = &session.content.collector;
    let body = format!("<specSet>{spec}</specSet><options><maxObjects>{OBJECTS}</maxObjects></options>");
    let mut method = "RetrievePropertiesEx";
    let mut answer = client.call(session, method, collector, &body, PAGE).await?;
    loop {
        let token = {
            let document = wire::parse(&answer).map_err(Error::Odd)?;
            // No value at all: nothing was found.
            let Some(page) = wire::child(wire::response(&document, method)?, "returnval") else { return Ok(()) };
            for object in wire::children(page, "objects") {
                if let Some(reference) = wire::child(object, "obj").and_then(MoRef::of) {
                    see(reference, object);
                }
            }
            wire::child(page, "token").and_then(|token| token.text()).map(str::to_owned)
        };
        let Some(token) = token else { return Ok(()) };
        method = "ContinueRetrievePropertiesEx";
        answer = client.call(session, method, collector, &format!("<token>{}</token>", wire::quote(&token)), PAGE).await?;
    }
}

/// The value of a property in an object's `propSet` or `changeSet` elements.
pub fn property<'a, 'input>(object: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    let set = wire::children(object, "propSet").find(|set| wire::text(*set, "name") == name)?;
    wire::child(set, "val")
}

/// Its text, empty where there is none.
pub fn property_text<'a>(object: Node<'a, '_>, name: &str) -> &'a str {
    property(object, name).and_then(|value| value.text()).unwrap_or_default()
}

fn prop_set(wanted: &Wanted<'_>) -> String {
    let mut spec = String::new();
    // Writing into a String cannot fail.
    for (kind, properties) in wanted {
        let _ = write!(spec, "<propSet><type>{kind}</type>");
        for property in *properties {
            let _ = write!(spec, "<pathSet>{property}</pathSet>");
        }
        spec.push_str("</propSet>");
    }
    spec
}

fn filter(wanted: &Wanted<'_>, view: &MoRef) -> String {
    let mut spec = prop_set(wanted);
    let _ = write!(
        spec,
        "<objectSet><obj type=\"{}\">{}</obj><skip>true</skip><selectSet xsi:type=\"TraversalSpec\"><name>view</name><type>ContainerView</type>\
         <path>view</path><skip>false</skip></selectSet></objectSet>",
        wire::quote(&view.kind),
        wire::quote(&view.value)
    );
    spec
}

/// Everything of some kinds below the root.
struct View {
    reference: MoRef,
}

impl View {
    async fn open(client: &Client, session: &Session, wanted: &Wanted<'_>) -> Result<Self, Error> {
        let root = &session.content.root;
        let mut body = format!("<container type=\"{}\">{}</container>", wire::quote(&root.kind), wire::quote(&root.value));
        for (kind, _) in wanted {
            let _ = write!(body, "<type>{kind}</type>");
        }
        body.push_str("<recursive>true</recursive>");
        let answer = client.call(session, "CreateContainerView", &session.content.views, &body, CALL).await?;
        Ok(Self { reference: returned(&answer, "CreateContainerView")? })
    }

    async fn close(self, client: &Client, session: &Session) {
        // One that stays ends with its session.
        let _ = client.call(session, "DestroyView", &self.reference, "", CALL).await;
    }
}

/// The reference that a call returned.
pub fn returned(answer: &str, method: &str) -> Result<MoRef, Error> {
    let document = wire::parse(answer).map_err(Error::Odd)?;
    let value = wire::child(wire::response(&document, method)?, "returnval").and_then(MoRef::of);
    value.ok_or_else(|| Error::Odd(format!("{method} gave no reference")))
}

/// Something that tells when properties change.
pub struct Changes {
    view: View,
    /// One of its own: others ask the session's, and whoever shares a collector shares its waiting.
    collector: MoRef,
    version: String,
}

impl Changes {
    /// Begins to listen; what is the case now counts as the first change.
    pub async fn begin(client: &Client, session: &Session, wanted: &Wanted<'_>) -> Result<Self, Error> {
        let answer = client.call(session, "CreatePropertyCollector", &session.content.collector, "", CALL).await?;
        let collector = returned(&answer, "CreatePropertyCollector")?;
        let view = View::open(client, session, wanted).await?;
        let body = format!("<spec>{}</spec><partialUpdates>false</partialUpdates>", filter(wanted, &view.reference));
        client.call(session, "CreateFilter", &collector, &body, CALL).await?;
        Ok(Self { view, collector, version: String::new() })
    }

    /// Waits up to `longest` for changes; answers the objects that have changed, come or gone.
    pub async fn next(&mut self, client: &Client, session: &Session, longest: Duration) -> Result<BTreeSet<MoRef>, Error> {
        let method = "WaitForUpdatesEx";
        let seconds = longest.as_secs();
        let (mut changed, mut is_more) = (BTreeSet::new(), false);
        loop {
            // What is truncated goes on at once.
            let wait = if is_more { 0 } else { seconds };
            let body = format!(
                "<version>{}</version><options><maxWaitSeconds>{wait}</maxWaitSeconds><maxObjectUpdates>{OBJECTS}</maxObjectUpdates></options>",
                wire::quote(&self.version)
            );
            let answer = client.call(session, method, &self.collector, &body, longest + CALL).await?;
            let document = wire::parse(&answer).map_err(Error::Odd)?;
            let Some(update) = wire::child(wire::response(&document, method)?, "returnval") else { return Ok(changed) };
            self.version = wire::text(update, "version").to_owned();
            for filter in wire::children(update, "filterSet") {
                changed.extend(wire::children(filter, "objectSet").filter_map(|object| wire::child(object, "obj").and_then(MoRef::of)));
            }
            is_more = true;
            if wire::text(update, "truncated") != "true" {
                return Ok(changed);
            }
        }
    }

    /// Stops listening.
    pub async fn end(self, client: &Client, session: &Session) {
        // What stays ends with its session.
        let _ = client.call(session, "DestroyPropertyCollector", &self.collector, "", CALL).await;
        self.view.close(client, session).await;
    }
}
