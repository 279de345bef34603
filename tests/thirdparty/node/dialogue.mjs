// How a test talks with a library, in lines of JSON. A line on standard input names a flow and tells what it needs; on
// standard output comes what it found, or what the library complains of, and before that a line for each address that
// only a person with a browser can visit.
import { createInterface } from 'node:readline';
import { inspect } from 'node:util';

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

async function heard() {
  const { value, done } = await lines.next();
  return done ? null : JSON.parse(value);
}

function say(message) {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}

// What the redirect URI received when a person had opened `url`: a URL, or a Request where a form was posted there.
export async function visit(url) {
  say({ visit: String(url) });
  const { url: arrived, form } = await heard();
  if (form === undefined) return new URL(arrived);
  return new Request(arrived, {
    method: 'POST',
    headers: { 'content-type': 'application/x-www-form-urlencoded' },
    body: new URLSearchParams(form).toString(),
  });
}

// One flow after the other, each as if nothing had been before it, until nobody asks any more.
export async function serve(flows) {
  for (let told = await heard(); told !== null; told = await heard()) {
    try {
      say({ found: await flows[told.flow](told) });
    } catch (problem) {
      say({ complaint: inspect(problem, { depth: 6 }) });
    }
  }
}
